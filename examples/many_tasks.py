"""Answer many tasks of an asyncio program in one batch, each as soon as it is done; give up on what takes too long."""

import asyncio
import time

from llmpipe import BaseLLMRunner, LLMRunnerFactory

QUESTIONS = [f"What is {n} + {n + 1}?" for n in range(16)]


async def ask(runner: BaseLLMRunner, question: str) -> None:
    """Print an answer and when it was there."""
    began = time.perf_counter()
    answer = await runner.agenerate(question, max_tokens=20, temperature=0)
    print(f"{question} {answer} ({time.perf_counter() - began:.3f} s)")


async def tell(runner: BaseLLMRunner, within_s: float) -> None:
    """Print a story as it is generated, as far as it gets."""
    story = ""
    try:
        async with asyncio.timeout(within_s):
            async for text in runner.astream("Tell me a story about a fox.", max_tokens=1000, stop=[]):
                story += text
    except TimeoutError:  # its request is given up, and its place in the batch is free
        story += "…"
    print(story)


async def main() -> None:
    """Ask everything at once."""
    with LLMRunnerFactory.create_runner({"backend": "llama.cpp", "model_path": "bundled"}) as runner:
        await asyncio.gather(*(ask(runner, question) for question in QUESTIONS), tell(runner, within_s=5))


asyncio.run(main())
