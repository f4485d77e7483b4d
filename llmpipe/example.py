"""The library in six examples, on the model that comes with llmpipe: `python -m llmpipe.example [transformers]`.

Put the path of a GGUF file, or of a checkpoint directory for transformers, in place of `bundled` to use another model.
"""

from __future__ import annotations

import sys

from llmpipe import BackendType, DeviceType, LLMError, LLMRunnerFactory, ModelConfig
from llmpipe.runners import BaseLLMRunner


def basic_usage(backend: str) -> None:
    """A dictionary of options → a runner → text."""
    config = {
        "llm": {
            "backend": backend,  # or "llama.cpp", "transformers"
            "model_path": "bundled",
            "temperature": 0.0,
            "max_tokens": 50,
        }
    }
    with LLMRunnerFactory.create_runner(config) as runner:
        print(runner.generate_text("What is the capital of France?"))


def typed_configuration(backend: str) -> BaseLLMRunner:
    """The same with types; the other examples use this runner."""
    config = ModelConfig(
        model_path="bundled",
        backend=BackendType(backend),
        device=DeviceType.AUTO,
        temperature=0.7,
        max_tokens=60,
    )
    return LLMRunnerFactory.create_runner(config)


def streaming(runner: BaseLLMRunner) -> None:
    """Text as it is generated."""
    for chunk in runner.generate_text_streaming("Tell me a story about a fox and a violin.", seed=1):
        print(chunk, end="", flush=True)
    print()


def chat_completion(runner: BaseLLMRunner) -> None:
    """A chat in OpenAI's format."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the opposite of hot?"},
    ]
    response = runner.create_chat_completion(messages, temperature=0)
    print(response["choices"][0]["message"]["content"])
    print(response["usage"])


def many_prompts(runner: BaseLLMRunner) -> None:
    """A list of prompts goes through the model in batches; one that cannot be run says why."""
    for completion in runner.run(["Add 20 and 22.", "Add 1 and 2.", "far too long " * 1000], temperature=0):
        print(completion.text if completion.error is None else f"error: {completion.error}")


def state(runner: BaseLLMRunner) -> None:
    """Memory, reloading, and errors that say what to do."""
    print(f"{runner.memory_usage()['rss_mb']:.0f} MB in memory, loaded in {runner.load_s:.2f} s")
    runner.reload(device="cpu")
    try:
        runner.generate_text("Hello!", temprature=0.5)  # type: ignore[call-arg]  # which a type checker says first
    except LLMError as error:
        print(f"{type(error).__name__}: {error}")


def main(backend: str = "llama.cpp") -> None:
    """Run all examples on one backend."""
    basic_usage(backend)
    with typed_configuration(backend) as runner:
        streaming(runner)
        chat_completion(runner)
        many_prompts(runner)
        state(runner)


if __name__ == "__main__":
    main(*sys.argv[1:2])
