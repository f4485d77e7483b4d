"""Answer a list of prompts from Python, and see how long each took."""

from llmpipe import LLMRunnerFactory

PROMPTS = ["What is 12 + 30?", "What is the capital of France?", "far too long " * 1000, "What is the opposite of hot?"]

with LLMRunnerFactory.create_runner({"backend": "llama.cpp", "model_path": "bundled", "max_tokens": 20}) as runner:
    for prompt, completion in zip(PROMPTS, runner.run(PROMPTS, temperature=0), strict=True):
        answer = completion.text if completion.error is None else f"error: {completion.error}"
        print(f"{prompt[:40]!r}: {answer} ({completion.latency_s or 0:.3f} s)")
