"""What a resumption must have in common with the run it continues: contents, not names."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import llmpipe
from llmpipe import BackendType, EchoRunner, LedgerError, LLMInitializationError, RunConfig, SamplingConfig, compose
from llmpipe.config import BACKENDS, ColumnsConfig
from llmpipe.datasets import Dataset, Scan
from llmpipe.exceptions import RunStopped
from llmpipe.fingerprint import fingerprint
from llmpipe.plan import plan
from llmpipe.runners.digests import model_digest
from llmpipe.runners.facts import Facts
from llmpipe.runners.weights import BUNDLED_DIR, hub_commit


@pytest.fixture
def of(write_jsonl: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Return the fingerprint of a run over one row, with the given overrides."""
    path = write_jsonl({"prompt": "hi"})

    def make(*overrides: str) -> dict[str, Any]:
        config: RunConfig = compose([f"dataset.path={path}", *overrides])
        return fingerprint(config, Dataset(config.dataset).scan())

    return make


ALWAYS, EXACTLY, NEVER = "always", "in reproducible mode", "never"
Kind = tuple[str, Any]
"""Whether an option counts, and a value to try."""
BACKEND: dict[str, Kind] = {
    "threads": (NEVER, 1),
    "slots": (NEVER, 3),
    "context": (ALWAYS, 64),
    "chat_template": (ALWAYS, "{{ messages }}"),
    "isolation": (NEVER, True),
    "batch_tokens": (EXACTLY, 64),
}
BACKEND_OPTIONS: dict[BackendType, dict[str, Kind]] = {
    BackendType.LLAMA_CPP: {
        **BACKEND,
        "n_gpu_layers": (EXACTLY, 1),
        "main_gpu": (EXACTLY, 1),
        "repack": (EXACTLY, "off"),
        "tensor_split": (EXACTLY, [1, 2]),
        "flash_attention": (ALWAYS, "off"),
        "cache_type_k": (ALWAYS, "f32"),
        "cache_type_v": (ALWAYS, "f32"),
        "micro_batch_tokens": (EXACTLY, 64),
        "mmap": (NEVER, False),
        "mlock": (NEVER, True),
        "lora": (ALWAYS, ["a.gguf"]),
        "rope_scaling": (ALWAYS, "linear"),
        "rope_freq_base": (ALWAYS, 1e4),
        "rope_freq_scale": (ALWAYS, 0.5),
        "yarn_original_context": (ALWAYS, 64),
    },
    BackendType.TRANSFORMERS: {
        **BACKEND,
        "dtype": (ALWAYS, "bfloat16"),
        "batching": (EXACTLY, "padded"),
        "attn_implementation": (ALWAYS, "eager"),
        "compile": (EXACTLY, True),
        "device_map": (EXACTLY, "auto"),
        "max_memory": (EXACTLY, {"cpu": "1GiB"}),
        "offload_folder": (NEVER, "there"),
        "lora": (ALWAYS, ["a"]),
        "revision": (ALWAYS, "v1"),
        "local_files_only": (NEVER, True),
        "trust_remote_code": (ALWAYS, True),
        "allow_pickle": (ALWAYS, True),
    },
}
ELSEWHERE = {"_target_", "model", "reproducible", "row_timeout_s"}
"""Have tests of their own, or need other options."""
RUN_OPTIONS: dict[str, Kind] = {
    "device.type": (EXACTLY, "cpu"),
    "device.index": (EXACTLY, 1),
    "dataset.limit": (ALWAYS, 1),
    "dataset.offset": (ALWAYS, 1),
    "dataset.shuffle": (ALWAYS, 1),
    # How a file is read shows in what its rows hold, which counts.
    "dataset.field": (NEVER, "data"),
    "dataset.format": (NEVER, "json"),
    "dataset.max_row_mb": (NEVER, 1),
    "dataset.csv.delimiter": (NEVER, "tab"),
    **{f"dataset.columns.{f.name}": (ALWAYS, "other") for f in fields(ColumnsConfig)},
    "prompt.format": (ALWAYS, "raw"),
    "prompt.system": (ALWAYS, "hi"),
    "prompt.template": (ALWAYS, "{prompt}"),
    "prompt.overflow": (ALWAYS, "truncate"),
    "prompt.tools": (ALWAYS, [{"type": "function", "function": {"name": "f"}}]),
    "prompt.chat_template_kwargs": (ALWAYS, {"a": 1}),
    "prompt.continue_final": (ALWAYS, False),
    "prompt.control_tokens": (ALWAYS, "parse"),
    "prompt.add_bos": (ALWAYS, False),
    "output.source": (NEVER, True),
    "output.format": (NEVER, "parquet"),
    "output.prefix": (NEVER, "x_"),
    "metrics.scorers": (NEVER, ["contains"]),
    "metrics.memory_interval_s": (NEVER, 1),
    **{f"sampling.{f.name}": (ALWAYS, 0.5) for f in fields(SamplingConfig) if f.type == "float"},
    **{f"sampling.{f.name}": (ALWAYS, 3) for f in fields(SamplingConfig) if f.type in ("int", "int | None")},
    "sampling.logit_bias": (ALWAYS, {5: 1}),
    "sampling.stop": (ALWAYS, ["a"]),
    "sampling.stop_token_ids": (ALWAYS, [1]),
    "sampling.ignore_eos": (ALWAYS, True),
    "seed": (ALWAYS, 1),
    "on_error": (NEVER, "stop"),
    "max_error_rate": (NEVER, 0.5),
    "run_timeout_s": (NEVER, 60),
    "trusted_modules": (NEVER, ["a"]),
}
NOT_OF_A_RUN = {"dataset.path", "backend"}
"""Where the dataset is does not count."""


def options_of(config: Any, path: str = "") -> Iterator[str]:
    for f in fields(config):
        inner = getattr(config, f.name)
        if is_dataclass(inner) and f.name != "backend":
            yield from options_of(inner, f"{path}{f.name}.")
        else:
            yield path + f.name


def with_option(config: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return replace(config, **{name: with_option(getattr(config, name), rest, value) if rest else value})


def check_kinds(config: RunConfig, options: dict[str, Kind]) -> None:
    scan = Scan(1, ["prompt"], [])
    for exact in (False, True):
        asked = with_option(config, "backend.reproducible", exact)
        before = fingerprint(asked, scan)
        for key, (kind, value) in options.items():
            counts = fingerprint(with_option(asked, key, value), scan) != before
            assert counts == (kind == ALWAYS or (kind == EXACTLY and exact)), (key, kind)


@pytest.mark.parametrize("backend", BACKEND_OPTIONS)
def test_of_every_option_of_a_backend_it_is_known_whether_it_decides_answers(backend: BackendType) -> None:
    options = BACKEND_OPTIONS[backend]
    assert options.keys() | ELSEWHERE == {f.name for f in fields(BACKENDS[backend])}
    check_kinds(compose([f"backend={backend.group}"]), {f"backend.{name}": kind for name, kind in options.items()})


def test_of_every_option_of_a_run_it_is_known_whether_it_decides_answers() -> None:
    config = compose()
    assert set(options_of(config)) == RUN_OPTIONS.keys() | NOT_OF_A_RUN
    check_kinds(config, RUN_OPTIONS)


def test_the_seed_of_a_run_counts_under_either_name(of: Callable[..., dict[str, Any]]) -> None:
    assert of("sampling.seed=5") == of("seed=5") != of()


def test_a_file_counts_by_its_content(of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    template, adapter = tmp_path / "chat.jinja", tmp_path / "a.gguf"
    template.write_text("one")
    adapter.write_bytes(b"one")
    asked = (f"backend.chat_template={template}", f"backend.lora=['{adapter}=0.5']")
    before = of(*asked)
    assert of(*asked) == before
    template.write_text("two")
    changed = of(*asked)
    assert changed != before
    adapter.write_bytes(b"two")
    assert of(*asked) != changed


def test_tools_count_by_what_they_are_and_not_by_where_they_stand(
    of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text('[{"name": "f"}]')
    other.write_text('[ {"name": "f"} ]')
    before = of(f"prompt.tools={one}")
    assert before == of(f"prompt.tools={other}") == of("prompt.tools=[{name:f}]") != of()
    one.write_text('[{"name": "g"}]')
    assert of(f"prompt.tools={one}") != before
    assert of("prompt.chat_template_kwargs={enable_thinking:false}") != of() != of("prompt.continue_final=false")


def test_a_backend_of_someone_elses_is_taken_at_its_word(of: Callable[..., dict[str, Any]]) -> None:
    foreign = ("backend=echo", "backend._target_=mine.Remote", "trusted_modules=[mine]")
    one = of(*foreign, "backend.model=gpt-x")
    assert one["model"] == "gpt-x"
    assert of(*foreign, "backend.model=gpt-y") != one


def test_a_model_in_parts_is_all_its_parts(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(b"GGUF")
    before = model_digest(str(parts[0]))
    parts[1].write_bytes(b"GGUF changed")
    assert model_digest(str(parts[0])) != before


def test_a_model_that_is_not_there_is_refused() -> None:
    with pytest.raises(LLMInitializationError, match="does not exist"):
        model_digest("./nowhere")


# --- what a runner says of itself -------------------------------------------------------------------------------------

ROWS = [{"prompt": "What is 2 + 2?"}, {"prompt": 5}, {"prompt": "What is 3 + 2?"}]
"""The second one stops a run with on_error=stop."""
Go = Callable[..., dict[str, Any]]


@pytest.fixture
def begun(write_jsonl: Callable[..., Path], tmp_path: Path) -> Callable[..., Go]:
    """Begin a run that a bad row ends at once; what is returned goes on with it."""
    directory = tmp_path / "run"

    def begin(*overrides: str) -> Go:
        asked = [f"dataset.path={write_jsonl(*ROWS)}", "sampling.max_tokens=2", *overrides]
        with pytest.raises(RunStopped):
            llmpipe.run(compose([*asked, "on_error=stop"]), directory)
        return lambda do=llmpipe.run: do(compose(asked), directory)

    return begin


@pytest.mark.parametrize("exact", ["false", "true"])
def test_a_run_goes_on_with_another_version_only_where_digits_may_differ_and_says_so(
    begun: Callable[..., Go], exact: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = begun("backend=echo", f"backend.reproducible={exact}")
    monkeypatch.setattr("llmpipe.fingerprint.__version__", "0.0.9")
    change = rf"llmpipe was '{llmpipe.__version__}', is '0\.0\.9'"
    for do in (plan, llmpipe.run):
        if exact == "true":
            with pytest.raises(LedgerError, match=rf"another model, package or machine: {change}, and backend.repro"):
                go_on(do)
            continue
        caplog.clear()
        assert go_on(do)["rows"] == 3
        assert [r.levelno for r in caplog.records if "answers may differ" in r.message] == [logging.WARNING]
    if exact == "true":
        monkeypatch.undo()
        assert go_on()["rows"] == 3
    monkeypatch.setattr("llmpipe.fingerprint.__version__", "0.0.8")
    caplog.clear()
    monkeypatch.setattr(EchoRunner, "_initialize_model", lambda self: pytest.fail("a model was loaded"))
    assert go_on()["rows"] == 3  # nothing is computed, so nothing can differ
    assert not caplog.records


def test_what_auto_became_must_stay_what_it_was(
    begun: Callable[..., Go], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED_DIR, model, ignore=shutil.ignore_patterns("*.gguf"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    units = "llmpipe.runners.transformers.loading.has_bfloat16_units"
    monkeypatch.setattr(units, lambda: False)
    asked = ["backend=transformers", f"backend.model={model}", "device=cpu", "backend.threads=1"]
    go_on = begun(*asked)
    monkeypatch.setattr(units, lambda: True)
    with pytest.raises(LedgerError, match="another model, package or machine: dtype was 'float32', is 'bfloat16'"):
        go_on()
    monkeypatch.setattr(units, lambda: False)
    assert go_on()["rows"] == 3


def test_a_device_counts_where_the_last_digit_does(begun: Callable[..., Go], monkeypatch: pytest.MonkeyPatch) -> None:
    devices = iter(["a", "b", "a"])
    monkeypatch.setattr(EchoRunner, "facts", lambda self: Facts(last_digits={"device": next(devices)}))
    go_on = begun("backend=echo", "backend.reproducible=true")
    with pytest.raises(LedgerError, match="device was 'a', is 'b', and backend.reproducible=true"):
        go_on()
    assert go_on()["rows"] == 3


def test_every_backend_names_its_packages_and_what_computes(runner: llmpipe.BaseLLMRunner) -> None:
    facts = runner.facts()
    assert facts.decides["commit"] is None  # it is a local model
    assert facts.may_decide["context"] > 0 and facts.last_digits["kernels"]
    assert {"torch", "transformers"} <= facts.may_decide.keys() or "llama_cpp_python" in facts.may_decide
    json.dumps([facts.decides, facts.may_decide, facts.last_digits])


def test_a_runner_in_a_process_of_its_own_says_the_same(llama_cpp_runner: llmpipe.BaseLLMRunner) -> None:
    options = {"backend": "llama_cpp", "isolation": True, "threads": 1}
    with llmpipe.LLMRunnerFactory.create_runner(options) as isolated:
        assert isolated.facts() == llama_cpp_runner.facts()


def test_a_hub_model_is_that_of_its_commit(
    begun: Callable[..., Go], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, commits = tmp_path / "hub" / "models--owner--name", ["a" * 40, "b" * 40]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.parent))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for commit in commits:
        shutil.copytree(BUNDLED_DIR, hub / "snapshots" / commit, ignore=shutil.ignore_patterns("*.gguf"))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commits[0])
    assert hub_commit("owner/name", "config.json", commits[1]) == commits[1]
    assert hub_commit("owner/other", "config.json") is None
    go_on = begun("backend=transformers", "backend.model=owner/name", "backend.local_files_only=true", "device=cpu")
    (hub / "refs" / "main").write_text(commits[1])
    for do in (plan, llmpipe.run):
        with pytest.raises(LedgerError, match=f"commit was '{commits[0]}', is '{commits[1]}'"):
            go_on(do)
    (hub / "refs" / "main").write_text(commits[0])
    assert go_on()["rows"] == 3
