"""A real model on real questions: llmpipe's two modes against `Llama.create_chat_completion`, and whether they agree.

    LLMPIPE_REAL=DIRECTORY python benchmarks/bench_real.py                # 100 questions; half an hour on two cores
    LLMPIPE_REAL=DIRECTORY python benchmarks/bench_real.py --rows 24 --contestants loop,llmpipe,reproducible

The questions are GSM8K's first ones (`gsm8k/test.jsonl`), as chats, answered greedily in at most 120 tokens by
`SmolLM2-135M-Instruct.Q4_1.gguf`; both files are looked for below the directories in $LLMPIPE_REAL.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import THREADS, Benchmark, Contestant, Figures, Line, Setting, Skipped, main, speed

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = "gsm8k/test.jsonl"
ROWS = 100
MAX_TOKENS = 120
CONTEXT = 1024


def find(name: str) -> Path:
    """Return where a file is below one of the directories in $LLMPIPE_REAL.

    Raises:
        Skipped: it is in none of them.
    """
    for directory in filter(None, os.environ.get("LLMPIPE_REAL", "").split(os.pathsep)):
        for found in sorted(Path(directory).rglob(name)):
            return found
    raise Skipped(f"{name} is not below LLMPIPE_REAL")


def chats(setting: Setting) -> list[list[dict[str, str]]]:
    """Return the questions, each as a chat."""
    lines = find(QUESTIONS).read_text(encoding="utf-8").splitlines()[: setting.rows or ROWS]
    return [[{"role": "user", "content": json.loads(line)["question"]}] for line in lines]


def measured(setting: Setting, name: str, started: float, answers: list[str], tokens: int) -> Figures:
    """Return the figures of a run, and keep its answers for whoever is compared with it."""
    wall_s = time.perf_counter() - started
    (setting.work / f"{name}-answers.json").write_text(json.dumps(answers), encoding="utf-8")
    return speed(wall_s, tokens) | {"rows_per_s": len(answers) / wall_s}


def loop(setting: Setting, name: str, **options: Any) -> Figures:
    """Ask `Llama.create_chat_completion`, question after question."""
    from llama_cpp import Llama

    llama = Llama(str(find(MODEL)), n_ctx=CONTEXT, verbose=False, **options)
    started, answers, tokens = time.perf_counter(), [], 0
    for chat in chats(setting):
        done: Any = llama.create_chat_completion(chat, max_tokens=MAX_TOKENS, temperature=0.0)
        answers.append(done["choices"][0]["message"]["content"])
        tokens += done["usage"]["completion_tokens"]
    return measured(setting, name, started, answers, tokens)


def ours(setting: Setting, name: str, backend: str = "llama.cpp", **options: Any) -> Figures:
    """Ask llmpipe all questions at once; `same` counts the answers that are the loop's, where that was run before."""
    from llmpipe import LLMRunnerFactory

    config = {"backend": backend, "model_path": str(find(MODEL)), "device": "cpu", "threads": THREADS, **options}
    with LLMRunnerFactory.create_runner({"llm": config}) as runner:
        started = time.perf_counter()
        done = runner.run(chats(setting), max_tokens=MAX_TOKENS, temperature=0.0)
        answers = [completion.text or completion.error or "" for completion in done]
        figures = measured(setting, name, started, answers, sum(c.completion_tokens or 0 for c in done))
    if (theirs := setting.work / "loop-answers.json").is_file():
        pairs = zip(answers, json.loads(theirs.read_text(encoding="utf-8")), strict=False)
        figures["same"] = sum(mine == other for mine, other in pairs)
    return figures


BENCHMARK = Benchmark(
    description=__doc__,
    prepare=lambda setting: None,
    models="SmolLM2-135M-Q4_1",
    contestants={
        "loop": Contestant(partial(loop, name="loop", n_threads=THREADS, n_threads_batch=THREADS)),
        "loop-defaults": Contestant(partial(loop, name="loop-defaults")),
        "llmpipe": Contestant(partial(ours, name="llmpipe")),
        "reproducible": Contestant(partial(ours, name="reproducible", reproducible=True)),
        "transformers": Contestant(partial(ours, name="transformers", backend="transformers"), once=True),
        "transformers-reproducible": Contestant(
            partial(ours, name="transformers-reproducible", backend="transformers", reproducible=True), once=True
        ),
    },
    lines=[
        Line("llmpipe, rows/s", "llmpipe", figure="rows_per_s", pattern="{:.2f}"),
        Line("llmpipe, generated tokens/s", "llmpipe", pattern="{:.0f}"),
        Line("against a `create_chat_completion` loop, threads matched", "llmpipe", "loop"),
        Line("against the same with its default threads", "llmpipe", "loop-defaults"),
        Line("reproducible mode against the loop, threads matched", "reproducible", "loop"),
        Line("rows with the loop's very answer", "llmpipe", figure="same", pattern="{:.0f}"),
        Line("the same in reproducible mode", "reproducible", figure="same", pattern="{:.0f}"),
        Line("backend=transformers (float32), generated tokens/s", "transformers", pattern="{:.0f}"),
        Line("the same in reproducible mode", "transformers-reproducible", pattern="{:.0f}"),
    ],
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
