"""`llmpipe plan` tells beforehand what a run then does, and leaves nothing behind but its report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import gguf_models
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmpipe
import llmpipe.plan
from llmpipe import BaseLLMRunner, LLMInitializationError, RunConfig, compose
from llmpipe.config import LlamaCppConfig, TransformersConfig
from llmpipe.plan import BINS, harmless, histogram, plan
from llmpipe.runners import LlamaCppRunner, TransformersRunner
from llmpipe.runners.batching import Engine
from llmpipe.runners.weights import BUNDLED_DIR

BACKENDS = ["llama_cpp", "transformers"]
CPU = ["device=cpu", "backend.threads=1"]
LONG = "word " * 3000


def run_llmpipe(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmpipe", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    files = [file for file in directory.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


# --- what a run then does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_foretells_tokens_prompts_slots_and_errors_of_the_run(
    backend: str, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_jsonl(
        *({"id": f"r{i}", "prompt": f"What is {i} + {i}?"} for i in range(9)),
        b"not json",
        {"id": "empty", "prompt": ""},
        {"id": "long", "prompt": LONG},
        {"id": "refused", "messages": [{"role": "assistant", "content": "Hello."}]},
        {"id": "bias", "prompt": "Hi", "sampling": {"logit_bias": {"999999": 1}}},
        {"prompt": "What is the capital of France?", "sampling": {"max_tokens": 7}},
    )
    config = compose([f"backend={backend}", f"dataset.path={path}", "sampling.max_tokens=3", *CPU])
    found = plan(config, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [".plan.json.llmpipe", "plan.json"]
    assert json.loads((tmp_path / "out" / "plan.json").read_bytes()) == found

    metrics = llmpipe.run(config, tmp_path / "out")
    assert {name: found[name] for name in ("rows", "rows_ok", "rows_error", "prompt_format", "dataset_digest")} == {
        name: metrics[name] for name in ("rows", "rows_ok", "rows_error", "prompt_format", "dataset_digest")
    }
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").open()]
    told = [(row["line"], row["id"], row["reason"]) for row in found["errors"]]
    assert told == [(row["line"], row["id"], row["reason"]) for row in errors]
    assert len(told) == 5

    rows = [json.loads(line) for line in (tmp_path / "out" / "outputs.jsonl").open()]
    tokens = {row["id"]: row["prompt_tokens"] for row in rows if row["prompt_tokens"]}
    longest = {row["id"]: row["prompt_tokens"] for row in found["longest"]}
    assert longest.pop("long") > found["model"]["context"] == metrics["runner"]["context"]
    assert (found["rows_over_context"], found["longest"][0]["id"]) == (1, "long")
    assert longest.items() <= tokens.items()
    assert found["counted_rows"] == len(tokens) + 1
    assert found["rows_without_id"] == 2
    assert found["sizes"]["slots"] == metrics["runner"]["slots"]
    assert found["prompts"][0]["text"].endswith("What is 0 + 0?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dataset_that_comes_along_is_counted_to_the_token(backend: str, tmp_path: Path) -> None:
    options = ["dataset=chats", "dataset.limit=15", "sampling.max_tokens=1"]
    config = compose([f"backend={backend}", *options, *CPU])
    found = plan(config, tmp_path / "out")
    metrics = llmpipe.run(config, tmp_path / "out")
    assert found["prompt_tokens"]["total"] == metrics["prompt_tokens"]
    assert sum(one["rows"] for one in found["prompt_tokens_histogram"]) == 15


def test_truncated_prompts_are_told_and_are_no_errors(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl({"prompt": LONG})
    found = plan(compose([f"dataset.path={path}", "prompt.overflow=truncate"]), tmp_path)
    assert (found["rows_error"], found["rows_over_context"]) == (0, 1)
    assert found["sizes"]["slot_tokens"] == found["model"]["context"]


# --- without weights --------------------------------------------------------------------------------------------------


def engine_of(runner: BaseLLMRunner) -> Engine:
    engine = runner._engine  # type: ignore[attr-defined]
    assert isinstance(engine, Engine)
    return engine


@pytest.mark.parametrize("options", [{}, {"cache_type_k": "q8_0"}])
def test_the_size_of_a_gguf_model_is_that_of_the_loaded_one(options: dict[str, Any]) -> None:
    config = LlamaCppConfig(threads=1, **options)
    with LlamaCppRunner(config, "cpu") as loaded, LlamaCppRunner(config, "cpu", weights=False) as preview:
        assert preview.preview is not None
        assert preview.preview.footprint == engine_of(loaded).executor.footprint
        assert preview.preview.context == engine_of(loaded).limit


@pytest.mark.parametrize(("arch", "most"), [("gemma3", 1.0), ("mamba", 1.0), ("lfm2", 2.0)])
def test_the_cache_per_token_of_other_kinds_of_gguf_models_is_told_or_bounded(
    arch: str, most: float, tmp_path: Path
) -> None:
    # Half of the layers of this lfm2 have no cache.
    path = gguf_models.write_model(tmp_path / "model.gguf", arch)
    config = LlamaCppConfig(model=str(path), threads=1)
    with LlamaCppRunner(config, "cpu") as loaded, LlamaCppRunner(config, "cpu", weights=False) as preview:
        assert preview.preview is not None
        real = engine_of(loaded).executor.footprint
        told = preview.preview.footprint.cache_bytes_per_token
        assert real.cache_bytes_per_token <= told <= most * real.cache_bytes_per_token
        assert preview.preview.context == engine_of(loaded).limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_of_a_checkpoint_is_that_of_the_loaded_one(dtype: str) -> None:
    config = TransformersConfig(dtype=llmpipe.config.Dtype(dtype), threads=1)
    with TransformersRunner(config, "cpu") as loaded, TransformersRunner(config, "cpu", weights=False) as preview:
        assert preview.preview is not None
        real, told = engine_of(loaded).executor.footprint, preview.preview.footprint
        assert (told.parameters, told.cache_bytes_per_token) == (real.parameters, real.cache_bytes_per_token)
        assert told.mapped_bytes == sum(p.numel() * p.element_size() for p in loaded._model.parameters())


def test_a_checkpoint_can_be_planned_for_where_its_weights_are_not(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in BUNDLED_DIR.glob("*.json*"):
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_bytes((BUNDLED_DIR / "chat_template.jinja").read_bytes())
    found = plan(compose(["backend=transformers", f"backend.model={model}", "dataset.limit=3"]), tmp_path / "out")
    assert (found["rows_ok"], found["prompt_format"]) == (3, "chat")


@pytest.mark.parametrize("runner_type", [LlamaCppRunner, TransformersRunner])
def test_a_runner_without_weights_answers_nothing_and_can_get_them(runner_type: type[BaseLLMRunner]) -> None:
    runner = runner_type({"threads": 1}, "cpu", weights=False)
    assert not runner.is_loaded and runner.is_chat("auto")
    with pytest.raises(llmpipe.LLMInferenceError, match="reload"):
        runner.generate_text("Hi")
    runner.reload()
    assert runner.preview is None
    assert "Paris" in runner.generate_text("What is the capital of France?", temperature=0.0)
    runner.close()


def test_padded_batches_are_foretold(tmp_path: Path) -> None:
    options = ["backend=transformers", "backend.batching=padded", "dataset.limit=50", "sampling.max_tokens=10"]
    found = plan(compose(options), tmp_path)
    assert found["sizes"]["slots"] == 16
    assert found["sizes"]["slot_tokens"] == found["longest"][0]["prompt_tokens"] + 10
    assert found["sizes"]["reasons"][0] == "padded batches: backend.batching=padded"


class LateTemplateRunner(BaseLLMRunner):
    """Knows its template only once it is loaded."""

    def _initialize_model(self) -> None:
        self.template = "{{ messages }}"

    @property
    def chat_template(self) -> str | None:
        return self.template


class PlainRunner(BaseLLMRunner):
    """One of the simplest kind."""

    def _initialize_model(self) -> None:
        raise AssertionError("its weights were loaded")

    def _run_streaming(self, prompt: str, max_tokens: int, temperature: float) -> Iterator[str]:
        yield prompt


def foreign(runner: type[BaseLLMRunner], path: Path) -> RunConfig:
    target = f"backend._target_={__name__}.{runner.__name__}"
    return compose(["backend=echo", target, f"trusted_modules=[{__name__}]", f"dataset.path={path}"])


def test_of_a_foreign_backend_what_can_be_known_is_told(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl({"prompt": "hi"}, {"prompt": "hi", "sampling": {"top_k": 3}}, {"prompt": 7})
    found = plan(foreign(PlainRunner, path), tmp_path)
    assert (found["rows"], found["rows_error"]) == (3, 2)
    assert "cannot honour sampling.top_k=3" in found["errors"][0]["reason"]
    assert found["prompt_tokens"] is None and found["rows_over_context"] is None and found["memory_mb"] is None


def test_a_foreign_backend_that_needs_its_weights_to_encode_is_named(
    write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(LLMInitializationError, match="LateTemplateRunner cannot be planned for.*_preview_model"):
        plan(foreign(LateTemplateRunner, write_jsonl({"prompt": "hi"})), tmp_path)


# --- long datasets ----------------------------------------------------------------------------------------------------


def test_of_a_long_dataset_every_row_is_checked_and_some_are_counted(
    write_jsonl: Callable[..., Path],
    tmp_path: Path,
    echo_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llmpipe.plan, "MOST_COUNTED", 10)
    path = write_jsonl(*({"prompt": "a b c"} if i != 33 else {"prompt": None} for i in range(95)))
    found = plan(echo_config(path), tmp_path)
    assert (found["counted_every"], found["counted_rows"], found["rows_error"]) == (10, 10, 1)
    assert found["errors"][0]["line"] == 34
    assert found["prompt_tokens"]["total"] == 30


@given(st.lists(st.integers(1, 10_000), max_size=200))
def test_every_count_is_in_its_bin_of_the_histogram(counts: list[int]) -> None:
    bins = histogram(counts)
    assert len(bins) <= BINS
    expected = Counter(i for count in counts for i, one in enumerate(bins) if one["from"] <= count <= one["to"])
    assert sum(one["rows"] for one in bins) == len(counts)
    assert {i: one["rows"] for i, one in enumerate(bins) if one["rows"]} == dict(expected)


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_shown(text: str) -> None:
    shown = harmless(text)
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert shown == text or not all(character.isprintable() or character == "\n" for character in text)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_rows_and_prompts_and_tells_by_its_exit_code_whether_all_can_run(
    write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_jsonl({"id": "\x1b[31mred", "prompt": "Say \x1b]0;owned\x07 [bold]\u202eit"})
    good = run_llmpipe("plan", f"dataset.path={path}", "hydra.run.dir=out", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert r"Say \x1b]0;owned\x07 [bold]\u202eit" in good.stdout
    assert not {"\x1b", "\x07", "\u202e"} & set(good.stdout)
    assert "1 (1 ok, 0 errors)" in good.stdout and "MB total" in good.stdout
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [".plan.json.llmpipe", "plan.json"]

    with path.open("a") as file:
        file.write('{"prompt": 5}\n')
    bad = run_llmpipe("plan", "backend=echo", f"dataset.path={path}", cwd=tmp_path)
    assert bad.returncode == 3
    assert f"{path} line 2: the prompt is a number, not text" in bad.stdout


@pytest.mark.parametrize("backend", ["echo", "llama_cpp"])
@pytest.mark.parametrize(("rows", "code"), [([], 0), ([b"{bad", {"prompt": "", "id": 1}], 3)])
def test_a_plan_of_no_row_that_can_be_run_is_shown(
    backend: str, rows: list[Any], code: int, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    path = write_jsonl(*rows)
    done = run_llmpipe("plan", f"backend={backend}", f"dataset.path={path}", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "there is no row that can be run" in done.stdout


def test_what_a_run_refuses_a_plan_refuses_in_the_same_words(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    path = write_jsonl({"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"})
    asked = ["backend=echo", f"dataset.path={path}", "hydra.run.dir=out"]
    planned, run = run_llmpipe("plan", *asked, cwd=tmp_path), run_llmpipe(*asked, cwd=tmp_path)
    assert (planned.returncode, run.returncode) == (1, 1)
    assert planned.stderr == run.stderr
    assert "the id 'a' stands twice" in planned.stderr


@pytest.mark.parametrize(
    "override",
    ["backend.model=nowhere.gguf", "backend.chat_template='{% if %}'", "backend.lora=[nowhere.gguf]", "device=mps"],
)
def test_a_model_that_cannot_be_loaded_is_refused_in_the_same_words(override: str, tmp_path: Path) -> None:
    config = compose([override])
    with pytest.raises(llmpipe.LLMError) as planned:
        plan(config, tmp_path / "planned")
    with pytest.raises(llmpipe.LLMError) as run:
        llmpipe.run(config, tmp_path / "run")
    assert (type(planned.value), str(planned.value)) == (type(run.value), str(run.value))
    assert not (tmp_path / "planned").exists()


def test_a_directory_that_holds_a_run_is_left_as_it_is(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    asked = ["backend=echo", f"dataset.path={write_jsonl({'prompt': 'x'}, {'prompt': 'y'})}", "hydra.run.dir=out"]
    assert run_llmpipe(*asked, cwd=tmp_path).returncode == 0
    with filelock.FileLock(tmp_path / "out" / ".lock"):  # as if it went on
        before = content(tmp_path / "out")
        planned = run_llmpipe("plan", *asked, cwd=tmp_path)
        assert planned.returncode == 0, planned.stderr
        assert "2 of them, in the run that is there" in planned.stdout
        other = run_llmpipe("plan", *asked, "seed=1", cwd=tmp_path)
        assert other.returncode == 1 and "seed was 0, is 1" in other.stderr
        assert content(tmp_path / "out") == before
