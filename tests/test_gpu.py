"""What only a GPU can show; run with -m gpu. The rest of the suite runs on the CPU."""

from __future__ import annotations

import json
from typing import Any

import llama_cpp
import pytest
import torch

from llmpipe import BaseLLMRunner, LLMRunnerFactory
from llmpipe.config import data_dir

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]
QUESTIONS = [json.loads(line)["prompt"] for line in (data_dir() / "questions.jsonl").open(encoding="utf-8")][:200]


def load(backend: str, device: str, **options: Any) -> BaseLLMRunner:
    if backend == "llama_cpp" and device == "cuda" and not llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this build of llama-cpp-python has no CUDA")
    return LLMRunnerFactory.create_runner({"backend": backend, "device": device, "temperature": 0.0, **options})


@pytest.mark.parametrize(
    ("backend", "options"),
    [("transformers", {}), ("transformers", {"batching": "padded"}), ("llama_cpp", {})],
    ids=["slots", "padded", "llama_cpp"],
)
def test_a_gpu_answers_as_a_cpu_does(backend: str, options: dict[str, Any]) -> None:
    with load(backend, "cpu") as runner:
        expected = [c.text for c in runner.run(QUESTIONS, max_tokens=30)]
    with load(backend, "cuda", **options) as runner:
        found = [c.text for c in runner.run(QUESTIONS, max_tokens=30)]
        used = runner.memory_usage()
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    assert same >= 0.99 * len(QUESTIONS)  # other kernels round otherwise
    assert used["device_mb"] and used["peak_device_mb"] and used["peak_device_mb"] >= used["device_mb"]


def test_rows_survive_a_gpu_that_is_too_small_for_all_of_them() -> None:
    prompts = [f"Tell me a story about {i} foxes. " * 20 for i in range(64)]
    with load("transformers", "cuda", slots=64) as runner:
        expected = [c.text for c in runner.run(prompts, max_tokens=30)]
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    # Leaves room for the weights and a few rows.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 48e6) / total)
    try:
        with load("transformers", "cuda", slots=64) as runner:
            done = runner.run(prompts, max_tokens=30)
            assert runner.info()["shrinks"] > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sum(c.text == text for c, text in zip(done, expected, strict=True)) >= 0.95 * len(prompts)
    assert all(c.error is None for c in done)


@pytest.mark.parametrize("batching", ["slots", "padded"])
def test_reloads_give_the_memory_of_the_gpu_back(batching: str) -> None:
    with load("transformers", "cuda", batching=batching) as runner:
        seen = []
        for _ in range(20):
            runner.run(QUESTIONS[:20], max_tokens=5)
            runner.reload()
            seen.append(torch.cuda.memory_allocated())
        assert max(seen[1:]) - min(seen[1:]) < 1e6
    assert torch.cuda.memory_allocated() < seen[-1]
