"""Texts that overflow a stack: read on one of their own, with the tokens that an unlimited stack gives."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from gguf_models import write_variant

from llmpipe import LLMRunnerFactory, Request, SamplingConfig
from llmpipe.runners.llama_cpp import deep_stack
from llmpipe.runners.llama_cpp.deep_stack import SHALLOW, longest_stretch, reading

RUN = 131_072
"""Letters without a space, that need 40 MB of stack."""
ROWS = [
    {"id": "before", "prompt": "What is 2 + 3?"},
    {"id": "long", "prompt": "Decode this: " + "Z" * RUN},
    {"id": "after", "prompt": "What is the capital of France?"},
]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def recursing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with a pre-tokenizer that is a regular expression of the C++ library."""
    return write_variant(tmp_path_factory.mktemp("model") / "gpt-4o.gguf", {"tokenizer.ggml.pre": "gpt-4o"})


def llmpipe(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmpipe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("isolation", [False, True])
def test_a_run_answers_the_rows_beside_one_that_overflowed_the_stack(
    isolation: bool, recursing: Path, write_jsonl: Write, tmp_path: Path
) -> None:
    data, out = write_jsonl(*ROWS), tmp_path / "out"
    run = [f"backend.model={recursing}", f"dataset.path={data}", "sampling.max_tokens=8", "backend.threads=1"]
    done = llmpipe(*run, f"hydra.run.dir={out}", f"backend.isolation={str(isolation).lower()}")
    assert done.returncode == 3, done.stderr
    answers = [json.loads(line) for line in (out / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [a["finish_reason"] for a in answers] == ["stop", "error", "stop"]
    assert "the prompt has 131" in answers[1]["error"]  # too many tokens for the context, and they were counted
    assert orjson.loads((out / "metrics.json").read_bytes())["runner"].get("isolation", {}).get("restarts", 0) == 0


def test_a_plan_counts_the_tokens_of_a_row_that_overflowed_the_stack(
    recursing: Path, write_jsonl: Write, tmp_path: Path
) -> None:
    run = ["plan", f"backend.model={recursing}", f"dataset.path={write_jsonl(*ROWS)}", "prompt=raw"]
    done = llmpipe(*run, f"hydra.run.dir={tmp_path / 'out'}")
    assert done.returncode == 3, done.stderr  # it is longer than the context
    assert orjson.loads((tmp_path / "out" / "plan.json").read_bytes())["longest"][0]["prompt_tokens"] > RUN


UNLIMITED = """
import llama_cpp, sys, threading
parameters = llama_cpp.llama_model_default_params()
parameters.vocab_only = True
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), parameters)
text, ids, count = sys.stdin.buffer.read(), (llama_cpp.llama_token * 400_000)(), []
vocab = llama_cpp.llama_model_get_vocab(model)
tokenize = lambda: count.append(llama_cpp.llama_tokenize(vocab, text, len(text), ids, len(ids), False, True))
threading.stack_size(1 << 30)
thread = threading.Thread(target=tokenize)
thread.start()
thread.join()
print(list(ids[: count[0]]))
"""


def test_the_tokens_of_a_long_text_are_those_of_a_stack_without_limit_from_any_thread(recursing: Path) -> None:
    text = "é日" * 20_000 + "!" * 50_000 + " " * 40_000 + "ab1" * 10_000
    command = [sys.executable, "-c", UNLIMITED, str(recursing)]
    expected = json.loads(subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout)
    request, found, before = Request(0, SamplingConfig(), prompt=text, truncate=True), [], threading.stack_size()
    config = {"backend": "llama_cpp", "model_path": str(recursing), "context": 400_000}
    with LLMRunnerFactory.create_runner(config) as runner:
        threads = [threading.Thread(target=lambda: found.append(runner.encode(request)[0])) for _ in range(3)]  # type: ignore[index]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [expected] * 3
    assert threading.stack_size() == before


def test_a_text_for_which_there_is_no_stack_is_an_error_that_says_why() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20, hard))
        assert reading("word\n" * 40_000, lambda: 7) == 7  # no line of it is long
        assert reading("Z" * 5_000, lambda: 8) == 8
        with pytest.raises(ValueError, match="200000 characters without a line break.*196 MiB.*ulimit -v"):
            reading("Z" * 200_000, lambda: 9)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_an_error_of_what_reads_is_its_own() -> None:
    def fail() -> None:
        raise KeyError("its own")

    for text in ("short", "Z" * 5_000):
        with pytest.raises(KeyError, match="its own"):
            reading(text, fail)


@pytest.mark.parametrize(
    ("text", "length"),
    [("", 0), ("abc", 3), ("a b\nabcd\n", 5), ("ab\n\n\n\n  c", 8), ("\n \n \nab", 5), ("a\r\nb", 3)],
)
def test_the_longest_stretch_is_that_of_a_line_with_the_white_space_after_it(text: str, length: int) -> None:
    assert longest_stretch(text) == length


def test_short_texts_are_read_where_they_are() -> None:
    for text, here in (("Z" * SHALLOW, True), ("Z" * (SHALLOW + 1), False)):
        assert (reading(text, threading.current_thread) is threading.current_thread()) == here
    assert deep_stack.BYTES_PER_CHARACTER * SHALLOW <= 2**20
