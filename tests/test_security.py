"""What comes from elsewhere, be it a model file, a dataset or a row's id, gets no further than it should."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
from commands import run_llmpipe

import llmpipe
from llmpipe import LLMError, LLMInitializationError, LLMRunnerFactory, compose
from llmpipe.config.loading import check_configs
from llmpipe.runners.weights import BUNDLED_DIR

SEED = int(os.environ.get("LLMPIPE_FUZZ_SEED", random.randrange(2**32)))
"""Of the damage done to model files; a test that fails names it."""
GGUF = (BUNDLED_DIR / "tiny-chat.gguf").read_bytes()
GGUF_HEADER = 47_488
"""Bytes before the weights: counts, metadata, tensor infos."""
WEIGHTS = (BUNDLED_DIR / "model.safetensors").read_bytes()
SMALL = {"threads": 1, "slots": 2, "context": 64, "device": "cpu"}


@pytest.fixture
def chance() -> random.Random:
    print(f"LLMPIPE_FUZZ_SEED={SEED}")  # pytest shows it where the test has failed
    return random.Random(SEED)


# --- damaged model files ----------------------------------------------------------------------------------------------

LOADER = """
import os, resource, sys
from llmpipe import LLMError, LLMRunnerFactory
os.environ["GGML_NO_BACKTRACE"] = "1"
for line in sys.stdin:
    backend, model, *lora = line.split()
    target = {"llama_cpp": "llmpipe.runners.LlamaCppRunner", "transformers": "llmpipe.runners.TransformersRunner"}
    from llmpipe.runners.targets import import_class
    options = {"model": model, "threads": 1, "slots": 2, "context": 64}
    options |= {"lora": lora} if lora else {}
    # As in the child: without probing.
    options |= {"isolation": True, "repack": "on"} if backend == "llama_cpp" else {}
    try:
        with import_class(target[backend])(options, "cpu") as runner:
            runner.run(["What is 2 + 2?", "a"], max_tokens=3)
        print("ok", flush=True)
    except LLMError as error:
        print("refused", flush=True)
"""


class Loader:
    """A process that loads models, one after another; a new one where that ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def load(self, backend: str, *files: Path) -> str:
        """Load a model and its adapters; return `ok`, `refused`, or `died`."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LOADER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{backend} {' '.join(map(str, files))}\n")
        self._process.stdin.flush()
        if said := self._process.stdout.readline().strip():
            return said
        self.close()
        return "died"

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


@pytest.fixture
def loader() -> Any:
    loader = Loader()
    yield loader
    loader.close()


def damaged(data: bytes, head: int, chance: random.Random) -> bytes:
    """Return `data` with a few bytes of its first `head` changed, often of the very first, or cut off."""
    if chance.random() < 0.1:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        place = chance.randrange(chance.choice([24, 1200, head]))
        changed[place] = chance.choice([changed[place] ^ 1 << chance.randrange(8), 0, 1, 127, 128, 255])
    return bytes(changed)


def check_refused(backend: str, model: Path, *lora: Path) -> None:
    """Load what would end the process in this process."""
    adapters = {"lora": [str(file) for file in lora]} if lora else {}
    with pytest.raises(LLMInitializationError):
        LLMRunnerFactory.create_runner({"backend": backend, "model_path": str(model), **SMALL, **adapters})


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_damaged_gguf_file_is_refused_or_runs_and_never_ends_the_process(
    count: int, tmp_path: Path, chance: random.Random, loader: Loader
) -> None:
    found = []
    for number in range(count):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(damaged(GGUF, GGUF_HEADER, chance))
        found.append(loader.load("llama_cpp", file))
        if found[-1] == "died":
            check_refused("llama_cpp", file)
        file.unlink()
    assert found.count("refused") > count / 3 and found.count("ok") > 0, found


@pytest.mark.parametrize(
    ("place", "value"), [(517, 8), (3810, 78), (47474, 8)], ids=["too many layers", "a token twice", "a norm in Q8_0"]
)
def test_a_gguf_file_on_which_llama_cpp_aborts_is_refused(
    place: int, value: int, tmp_path: Path, loader: Loader
) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(GGUF[:place] + bytes([value]) + GGUF[place + 1 :])
    assert loader.load("llama_cpp", file) == "died"
    check_refused("llama_cpp", file)
    done = run_llmpipe(f"backend.model={file}", "dataset.limit=2", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot be loaded, or is damaged" in done.stderr and "crashed the backend (signal 6, SIGABRT)" in done.stderr


def test_a_dry_run_survives_a_file_whose_vocabulary_makes_llama_cpp_abort(tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(GGUF[:3810] + bytes([78]) + GGUF[3811:])
    done = run_llmpipe("plan", f"backend.model={file}", "dataset.limit=2", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot be loaded, or is damaged" in done.stderr and "crashed the backend (signal 6, SIGABRT)" in done.stderr


@pytest.mark.parametrize("count", [30, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_damaged_adapter_is_refused_or_runs_and_never_ends_the_process(
    count: int, tmp_path: Path, chance: random.Random, loader: Loader
) -> None:
    pair = np.ones((1, 256), np.float32), np.ones((256, 1), np.float32)
    whole = gguf_models.write_adapter(tmp_path / "whole.gguf", {"blk.0.attn_q.weight": pair}).read_bytes()
    model, found = BUNDLED_DIR / "tiny-chat.gguf", []
    for number in range(count):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(damaged(whole, len(whole) - 2048, chance))
        found.append(loader.load("llama_cpp", model, file))
        if found[-1] == "died":
            check_refused("llama_cpp", model, file)
        file.unlink()
    assert "refused" in found, found


def test_a_sound_file_is_tried_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "sound.gguf"
    shutil.copy(BUNDLED_DIR / "tiny-chat.gguf", file)
    caplog.set_level("INFO", "llmpipe")
    for tries in (1, 1, 2):
        if tries == 2:
            file.write_bytes(GGUF)  # at another time: perhaps another file
        with LLMRunnerFactory.create_runner({"model_path": str(file), **SMALL}) as runner:
            assert runner.generate_text("What is 2 + 2?", max_tokens=3)
        assert caplog.text.count("tried in a process of its own") == tries


def checkpoint(directory: Path, weights: bytes = WEIGHTS, **changes: Any) -> Path:
    directory.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED_DIR / name, directory / name)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    (directory / "model.safetensors").write_bytes(weights)
    return directory


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_safetensors_are_refused_or_run_and_never_end_the_process(
    count: int, tmp_path: Path, chance: random.Random, loader: Loader
) -> None:
    head = 8 + int.from_bytes(WEIGHTS[:8], "little")
    found = []
    for _ in range(count):
        directory = checkpoint(tmp_path / "model", damaged(WEIGHTS, head, chance))
        found.append(loader.load("transformers", directory))
        shutil.rmtree(directory)
    assert set(found) <= {"ok", "refused"} and "refused" in found, found


WILD = [0, -1, 10**12, 2**63, 1.5, float("nan"), "x", None, [], {}, True]


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_wild_config_is_refused_or_runs_and_never_ends_the_process(
    count: int, tmp_path: Path, chance: random.Random, loader: Loader
) -> None:
    keys = list(json.loads((BUNDLED_DIR / "config.json").read_text()))
    found = {}
    for number in range(count):
        changes = {chance.choice(keys): chance.choice(WILD)} if number else {"num_hidden_layers": 10**12}
        directory = checkpoint(tmp_path / "model", **changes)
        found[str(changes)] = loader.load("transformers", directory)
        shutil.rmtree(directory)
    assert set(found.values()) <= {"ok", "refused"}, found


ENDLESS = (
    "{{ lipsum(n=10 ** 9) }}"
    "{% macro f(x=lipsum(n=10 ** 9), y='x' * 10 ** 12) %}{% endmacro %}"
    "{% set x = 9 ** 9 ** 9 ** 9 %}"
    "{% for i in range(10 ** 12) %}{{ i }}{% endfor %}"
)
"""A template that is never done, in parts that could be computed before there is a chat."""


@pytest.mark.parametrize("backend", ["llama_cpp", "transformers"])
def test_a_template_that_is_never_done_holds_up_neither_loading_nor_a_run(backend: str, tmp_path: Path) -> None:
    if backend == "llama_cpp":
        model = gguf_models.write_variant(tmp_path / "m.gguf", {"tokenizer.chat_template": ENDLESS})
    else:
        model = checkpoint(tmp_path / "model")
        (model / "chat_template.jinja").write_text(ENDLESS)
    started = time.monotonic()
    with LLMRunnerFactory.create_runner({"backend": backend, "model_path": str(model), **SMALL}) as runner:
        assert runner.chat_template == ENDLESS
        with pytest.raises(ValueError, match="the chat template refuses these messages"):
            runner.render([{"role": "user", "content": "x"}])
        assert runner.generate_text("x", prompt_format="raw", max_tokens=2)
    assert time.monotonic() - started < 30


# --- secrets, paths, terminals ----------------------------------------------------------------------------------------

CANARY = "canary-3f9a77c1d2"


def test_a_secret_of_the_environment_is_in_no_file_and_nothing_that_is_said(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = write_jsonl({"prompt": "${oc.env:SECRET} $SECRET {SECRET} %SECRET%"}, {"prompt": None}, b"{bad")
    secrets = {name: CANARY for name in ("SECRET", "HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    for number, options in enumerate((["backend.isolation=true"], ["backend.isolation=false", "output=parquet"])):
        directory = tmp_path / f"run{number}"
        overrides = [f"dataset.path={rows}", f"hydra.run.dir={directory}", "sampling.max_tokens=4", *options]
        done = run_llmpipe(*overrides, "hydra.verbose=true", cwd=tmp_path, **secrets)
        assert done.returncode == 3, done.stderr
        assert CANARY not in done.stdout + done.stderr
        files = [file for file in directory.rglob("*") if file.is_file()]
        assert {"ledger.sqlite", "metrics.json", "report.html", "run.log", "config.yaml"} <= {
            file.name for file in files
        }
        assert [file for file in files if CANARY.encode() in file.read_bytes()] == []


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_ids_that_look_like_paths_are_text_and_make_no_file(
    format: str, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    ids = ["../../up", str(tmp_path / "absolute"), "nul\0byte", "a/b", "..", "CON", "x\n.", "~root", "$(touch x)"]
    rows = write_jsonl(*({"id": name, "prompt": "hi"} for name in ids))
    before = {path for path in tmp_path.rglob("*")}
    config = compose(["backend=echo", f"dataset.path={rows}", f"output={format}"])
    llmpipe.run(config, tmp_path / "deep" / "run")
    assert llmpipe.read_run(tmp_path / "deep" / "run").rows["id"].tolist() == ids
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} - {p.relative_to(tmp_path) for p in before}
    assert all(path.parts[0] == "deep" for path in made)
    assert {path.name for path in (tmp_path / "deep/run").iterdir()} >= {f"outputs.{format}", "errors.jsonl"}
    assert not [path for path in (tmp_path / "deep/run").iterdir() if path.is_dir()]


def test_links_in_a_run_directory_are_not_written_through(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows, outside = write_jsonl({"prompt": "hi"}), tmp_path / "outside"
    outside.write_bytes(b"mine")
    config = compose(["backend=echo", f"dataset.path={rows}"])
    for name in ("outputs.jsonl", "metrics.json", "errors.jsonl", "report.html"):
        directory = tmp_path / name.replace(".", "-")
        directory.mkdir()
        (directory / name).symlink_to(outside)
        try:
            llmpipe.run(config, directory)
        except LLMError as error:
            assert name in str(error)
        assert outside.read_bytes() == b"mine"


IN_PLACE = ["run.log", ".hydra", ".hydra/config.yaml", ".hydra/overrides.yaml", ".lock", ".input-0", ".input-0.tmp"]
IN_PLACE += ["ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"]


@pytest.mark.parametrize("link", ["to a file", "to a directory", "to nothing", "hard"])
def test_a_link_where_a_run_would_write_is_refused_in_a_line_before_anything_is_written(
    link: str, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows, victim = write_jsonl({"prompt": "hi"}), tmp_path / "victim"
    file, folder = victim / "file", victim / "folder"
    folder.mkdir(parents=True)
    file.write_bytes(b"mine")
    fresh, begun = tmp_path / "fresh", tmp_path / "begun"
    llmpipe.run(config := compose(["backend=echo", f"dataset.path={rows}"]), tmp_path / "before")
    for name in IN_PLACE if link == "to a file" else [".hydra", "run.log"]:
        for directory in (fresh, begun):
            shutil.rmtree(directory, ignore_errors=True)
        fresh.mkdir()
        shutil.copytree(tmp_path / "before", begun)
        for directory in (fresh, begun):
            place = directory / name
            place.parent.mkdir(exist_ok=True)
            place.unlink(missing_ok=True)
            if link == "hard":
                if name == ".hydra":
                    place.mkdir()
                    place /= "hydra.yaml"
                os.link(file, place)
            else:
                place.symlink_to({"to a file": file, "to a directory": folder, "to nothing": victim / "new"}[link])
        asked = [["backend=echo", f"dataset.path={rows}", "hydra.run.dir=fresh"]]
        if ".hydra" not in name and name != "run.log":
            asked = [] if name != ".lock" else [*asked, ["resume", "begun"], ["export", "begun"], ["plan", *asked[0]]]
            for directory in (fresh, begun):
                with pytest.raises(LLMError, match="is a symlink"):
                    llmpipe.run(config, directory)
        for arguments in asked:
            done = run_llmpipe(*arguments, cwd=tmp_path)
            said = "has other names too" if link == "hard" else "is a symlink (to "
            assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
            assert said in done.stderr and Path(name).name in done.stderr
        assert sorted(victim.rglob("*")) == [file, folder] and file.read_bytes() == b"mine"
        assert {path.name for path in fresh.iterdir()} == {Path(name).parts[0]}


def test_links_in_a_sweep_and_logs_of_other_names_are_refused_too_and_a_link_to_a_run_directory_is_not(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    asked = ["backend=echo", f"dataset.path={write_jsonl({'prompt': 'hi'})}"]
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_bytes(b"mine")
    for number, (name, target, more) in enumerate(
        [
            ("0", victim, []),
            ("1", victim, ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
            ("1/run.log", victim / "file", []),
            ("0/.hydra", victim, ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]),
            ("multirun.yaml", victim / "file", []),
            ("deep/0/x.log", victim / "file", ["hydra.sweep.subdir=deep/${hydra.job.num}", "hydra.job.name=x"]),
        ]
    ):
        place = tmp_path / f"sweep{number}" / name
        place.parent.mkdir(parents=True)
        place.symlink_to(target)
        done = run_llmpipe("-m", "seed=1,2", f"hydra.sweep.dir=sweep{number}", *asked, *more, cwd=tmp_path)
        assert done.returncode == 1, done.stdout
        assert [line for line in done.stderr.splitlines() if f"{name} is a symlink" in line] == [
            done.stderr.splitlines()[-1]
        ]
        assert [file.name for file in victim.iterdir()] == ["file"] and (victim / "file").read_bytes() == b"mine"
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    done = run_llmpipe(*asked, "hydra.run.dir=link/0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run").symlink_to(tmp_path / "real" / "0")
    for arguments in (["resume", "run"], [*asked, "hydra.run.dir=run"]):
        assert run_llmpipe(*arguments, cwd=tmp_path).returncode == 0


def test_the_configs_of_another_program_are_not_written_over(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    asked = ["backend=echo", f"dataset.path={write_jsonl({'prompt': 'hi'})}", "hydra.run.dir=out"]
    theirs = tmp_path / "out" / ".hydra" / "config.yaml"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("db:\n  driver: mysql\n")
    done = run_llmpipe(*asked, cwd=tmp_path)
    assert done.returncode == 1 and ".hydra/config.yaml is another program's" in done.stderr
    assert theirs.read_text() == "db:\n  driver: mysql\n"
    shutil.rmtree(tmp_path / "out")
    refused = run_llmpipe(*asked, "prompt.template='{nothing}'", cwd=tmp_path)  # it leaves its own there
    assert refused.returncode == 1 and theirs.exists()
    assert run_llmpipe(*asked, cwd=tmp_path).returncode == 0
    for text in (theirs.read_text()[:begun] for begun in (0, 3, 40, 400)):  # as a beginning that is killed leaves them
        theirs.write_text(text)
        check_configs(theirs)


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b31m\x08\r"


def test_escapes_from_rows_and_models_do_not_reach_the_terminal(
    tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    rows = write_jsonl(
        {"id": ESCAPES, "prompt": f"say {ESCAPES}"},
        {"messages": [{"role": ESCAPES, "content": "x"}]},
        {"messages": [{"role": "user", "content": ESCAPES}], "sampling": {ESCAPES: 1}},
    )
    template = "{{ raise_exception(messages[0].content) }}"
    for number, options in enumerate((["backend=echo"], [f"backend.chat_template='{template}'", "on_error=stop"])):
        done = run_llmpipe(f"dataset.path={rows}", f"hydra.run.dir=run{number}", *options, cwd=tmp_path)
        assert done.returncode == (3, 1)[number], done.stderr
        said = done.stdout + done.stderr
        assert [c for c in said if not c.isprintable() and c != "\n"] == []
        if number:
            assert "\\x1b]0;owned" in said


def test_rows_are_no_markup_in_the_report_of_a_run(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    markup = "</pre><script>document.title='owned'</script><img src=x onerror=alert(1)>"
    rows = [{"id": markup, "prompt": markup, "reference": markup}, {"id": f"{markup}2", "prompt": None}]
    hostile, tame = tmp_path / "hostile", tmp_path / "tame"
    llmpipe.run(compose(["backend=echo", f"dataset.path={write_jsonl(*rows)}"]), hostile)
    rows = [{"id": "a", "prompt": "b", "reference": "b"}, {"id": "c", "prompt": None}]
    llmpipe.run(compose(["backend=echo", f"dataset.path={write_jsonl(*rows)}"]), tame)
    tags = [re.findall(r"<[^>]*>", (run / "report.html").read_text(encoding="utf-8")) for run in (hostile, tame)]
    assert len(tags[0]) == len(tags[1]) and not any("onerror" in tag or tag == "<script>" for tag in tags[0])
    assert "&lt;script&gt;document.title=" in (hostile / "report.html").read_text(encoding="utf-8")


def test_text_of_a_dataset_is_never_rendered_as_a_template(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    text = "{{ 7 * 7 }} {% raw %} {question} {{question}} ${seed} {0} %s {__class__}"
    rows = write_jsonl({"prompt": text, "question": text}, {"prompt": "x", "question": "{prompt}"})
    for name, overrides in {
        "plain": [],
        "template": ["prompt.template='{question}'"],
        "chat": ["backend.chat_template='{{ messages[0].content }}'", "prompt=chat"],
    }.items():
        if name == "chat":  # echo has no templates
            with LLMRunnerFactory.create_runner({"chat_template": "{{ messages[0].content }}", **SMALL}) as runner:
                assert runner.render([{"role": "user", "content": text}]) == text
            continue
        llmpipe.run(compose(["backend=echo", f"dataset.path={rows}", *overrides]), tmp_path / name)
        found = llmpipe.read_run(tmp_path / name).rows["completion"].tolist()
        assert found == [text, "{prompt}" if name == "template" else "x"]
