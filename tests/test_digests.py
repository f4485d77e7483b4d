"""The files that a model was digested from stay as they were while answers are computed, or those do not count."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import llmpipe
from llmpipe import LLMInferenceError, LLMInitializationError, RunConfig, compose
from llmpipe.progress import Progress
from llmpipe.runners import digests
from llmpipe.runners.digests import TEMPLATES, State, Witness, content_digest, model_digest
from llmpipe.runners.weights import BUNDLED_DIR


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint, reached by a link, whose largest file is a link as well, as in the hub's cache."""
    shutil.copytree(BUNDLED_DIR, tmp_path / "v1")
    (tmp_path / "blob").write_bytes((tmp_path / "v1/model.safetensors").read_bytes())
    (tmp_path / "v1/model.safetensors").unlink()
    (tmp_path / "v1/model.safetensors").symlink_to("../blob")
    (tmp_path / "current").symlink_to("v1")
    return tmp_path / "current"


def spoil(file: Path) -> None:
    """Change a byte of the weights where it stands."""
    with file.open("r+b") as stream:
        stream.seek(-100, 2)
        byte = stream.read(1)
        stream.seek(-100, 2)
        stream.write(bytes([byte[0] ^ 1]))


def put_back(file: Path) -> None:
    """Overwrite a file, and set all back that a program can."""
    before = file.stat()
    spoil(file)
    spoil(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(path: Path) -> None:
    """Put something else in a place, and then what was there before."""
    path.rename(path.with_name("away"))
    path.symlink_to("/dev/null")
    path.unlink()
    path.with_name("away").rename(path)


def point(link: Path, *targets: str) -> None:
    for target in targets:
        link.unlink()
        link.symlink_to(target)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "overwritten in place": (lambda m: spoil(m / "model.safetensors"), "model.safetensors was changed"),
    "overwritten and put back": (lambda m: put_back(m / "model.safetensors"), "model.safetensors was changed"),
    "a small file put back": (lambda m: swap(m / "tokenizer.json"), "tokenizer.json was changed"),
    "replaced": (lambda m: shutil.copy(m / "config.json", m / "x") and os.replace(m / "x", m / "config.json"),
                 "config.json was changed"),
    "written to at its end": (lambda m: (m / "chat_template.jinja").open("a").write(" "), "chat_template.jinja was ch"),
    "added": (lambda m: (m / "added_tokens.json").write_text("{}"), "added_tokens.json was added"),
    "a template added": (lambda m: (m / TEMPLATES).mkdir() or (m / TEMPLATES / "tool_use.jinja").write_text("x"),
                         "tool_use.jinja was added"),
    "taken away": (lambda m: (m / "generation_config.json").unlink(), "generation_config.json was taken away"),
    "all taken away": (lambda m: shutil.rmtree(m.resolve()), "was taken away"),
    "a blob put back": (lambda m: swap(m.parent / "blob"), "model.safetensors was changed"),
    "the link to a blob": (lambda m: point(m / "model.safetensors", "/dev/null", "../blob"), "safetensors was changed"),
    "the link to all": (lambda m: point(m, "/tmp", "v1"), "current was changed"),
    "all put back": (lambda m: swap(m.parent / "v1"), "current was changed"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed_also_once_it_was_undone(name: str, model: Path) -> None:
    witness = Witness("; so there")
    model_digest(str(model), witness)
    witness.check()
    change, said = CHANGES[name]
    change(model)
    with pytest.raises(LLMInferenceError, match=rf"{said}.* while answers were computed with it: .*; so there$"):
        witness.check()


def test_what_was_noticed_once_is_not_forgotten(model: Path) -> None:
    witness = Witness()
    model_digest(str(model), witness)
    (model / "added_tokens.json").touch()
    for _ in range(2):
        with pytest.raises(LLMInferenceError, match="added_tokens.json was added"):
            witness.check()
        (model / "added_tokens.json").unlink(missing_ok=True)


def test_files_that_are_only_numbered_anew_are_let_pass(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some file systems in user space do."""
    of, numbers = State.of, itertools.count()

    def anew(path: Path) -> State:
        return of(path)._replace(place=(next(numbers),))

    monkeypatch.setattr(State, "of", anew)
    witness = Witness()
    assert model_digest(str(model), witness) == model_digest("bundled")
    witness.check()
    spoil(model / "tokenizer.json")
    with pytest.raises(LLMInferenceError, match="tokenizer.json was changed"):
        witness.check()


def test_what_leaves_the_content_alone_is_let_pass(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    witness, digested = Witness(), []
    model_digest(str(model), witness)
    digest = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda path: digested.append(path) or digest(path))  # type: ignore[func-returns-value]
    (model / "tokenizer.json").chmod(0o600)
    os.link(model / "config.json", model.parent / "another name")
    witness.check()
    assert digested == [model]  # that it was let pass is remembered
    for _ in range(3):
        (model / "README.md").write_text("a note")
        (model / "runs").mkdir(exist_ok=True)
        (model / "runs/outputs.json").write_text("not the model's")
        witness.check()
    assert digested == [model]


def test_other_content_is_noticed_though_the_rights_have_changed_as_well(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = Witness()
    model_digest(str(model), witness)
    before = (model / "config.json").stat()
    (model / "config.json").write_bytes((model / "config.json").read_bytes().replace(b"2048", b"1024"))
    os.utime(model / "config.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    (model / "config.json").chmod(0o600)
    with pytest.raises(LLMInferenceError, match="was changed"):
        witness.check()


@pytest.mark.parametrize("suffix", ["", "=0.5"])
def test_templates_adapters_and_parts_are_watched_too(suffix: str, tmp_path: Path) -> None:
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    for file in (first, second):
        file.write_bytes(b"x" * 2000)
    witness = Witness()
    before = content_digest(f"{first}{suffix}", witness)
    spoil(second)
    assert content_digest(f"{first}{suffix}") != before
    with pytest.raises(LLMInferenceError, match="m-00002-of-00002.gguf was changed"):
        witness.check()


def test_a_file_that_is_being_written_has_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "growing.gguf"
    file.write_bytes(b"x")
    digest = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda path: (file.open("a").write("x"), digest(path))[1])
    with pytest.raises(LLMInitializationError, match=r"growing.gguf is being written to: wait"):
        model_digest(str(file))


# --- in the middle of a run -------------------------------------------------------------------------------------------


def config_of(model: Path, *overrides: str) -> RunConfig:
    options = ["sampling=greedy", "sampling.max_tokens=12", "dataset.limit=24", "backend.reproducible=true"]
    return compose([f"backend.model={model}", *options, "backend.threads=1", "backend.slots=4", *overrides])


def answers(directory: Path) -> list[str]:
    return [json.loads(line)["completion"] for line in (directory / "outputs.jsonl").read_bytes().splitlines()]


def at(number: int, act: Callable[[], None]) -> Callable[[Progress], None]:
    """Return a `progress` that acts once so many rows are done."""
    pending = [act]
    return lambda progress: pending.pop()() if pending and progress.done == number else None


def replace_weights(file: Path) -> None:
    """Put a file of other weights in the place of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    (file.parent / "new").write_bytes(data)
    os.replace(file.parent / "new", file)


FILES = {"llama_cpp": "tiny-chat.gguf", "transformers": "model.safetensors"}


def with_weights(backend: str, file: Path) -> RunConfig:
    options = [f"backend={backend}", "device=cpu"] + [f"backend.model={file}"] * (backend == "llama_cpp")
    return config_of(file.parent, *options)


@pytest.fixture(scope="module", params=FILES)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """Run a backend; return its name and the answers."""
    backend, directory = request.param, tmp_path_factory.mktemp("undisturbed")
    llmpipe.run(with_weights(backend, BUNDLED_DIR / FILES[backend]), directory)
    return backend, answers(directory)


@pytest.mark.parametrize("how", ["in place", "put back", "replaced"])
def test_answers_of_a_model_that_is_changed_meanwhile_do_not_count(
    undisturbed: tuple[str, list[str]], how: str, tmp_path: Path
) -> None:
    backend, expected = undisturbed
    model = Path(shutil.copytree(BUNDLED_DIR, tmp_path / "model"))
    file, directory = model / FILES[backend], tmp_path / "run"
    shutil.copy2(file, tmp_path / "whole")
    config = with_weights(backend, file)

    def change() -> None:
        if how == "replaced":
            replace_weights(file)
            return
        with file.open("r+b") as stream:  # which is mapped: the model that runs computes with it
            stream.seek(file.stat().st_size // 2)
            stream.write(bytes(file.stat().st_size // 2))

    def undo() -> None:
        if how == "put back":
            with file.open("r+b") as stream:
                stream.write((tmp_path / "whole").read_bytes())
            shutil.copystat(tmp_path / "whole", file)

    pending = {8: change, 16: undo}

    def act(progress: Progress) -> None:
        if progress.done in pending:
            pending.pop(progress.done)()

    with pytest.raises(
        LLMInferenceError, match=rf"{file.name} was changed .*continue with: llmpipe resume {directory}"
    ):
        llmpipe.run(config, directory, act)
    assert not (directory / "outputs.jsonl").exists()
    shutil.copy2(tmp_path / "whole", file)
    assert llmpipe.run(config, directory)["rows_ok"] == 24
    assert answers(directory) == expected


def test_a_model_that_was_replaced_is_not_answered_from_when_the_backend_is_started_again(tmp_path: Path) -> None:
    model = Path(shutil.copy2(BUNDLED_DIR / "tiny-chat.gguf", tmp_path))
    config = config_of(model, "backend=llama_cpp", "backend.isolation=true", "backend.repack=on")

    def replace_and_kill() -> None:
        replace_weights(model)
        for child in psutil.Process().children():
            if "llmpipe.runners.service" in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(LLMInferenceError, match="tiny-chat.gguf was changed .*resume "):
        llmpipe.run(config, tmp_path / "run", at(8, replace_and_kill))
    shutil.copy2(BUNDLED_DIR / "tiny-chat.gguf", model)
    assert llmpipe.run(config, tmp_path / "run")["rows_ok"] == 24
    llmpipe.run(config_of(BUNDLED_DIR / "tiny-chat.gguf", "backend=llama_cpp", "backend.repack=on"), tmp_path / "plain")
    assert answers(tmp_path / "run") == answers(tmp_path / "plain")


def test_a_model_that_is_replaced_between_its_digest_and_its_loading_is_not_answered_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copy2(BUNDLED_DIR / "tiny-chat.gguf", tmp_path))
    from llmpipe.runners.factory import LLMRunnerFactory

    load = LLMRunnerFactory.from_target.__func__  # type: ignore[attr-defined]

    def load_late(*args: Any, **options: Any) -> Any:
        replace_weights(model)
        return load(LLMRunnerFactory, *args, **options)

    monkeypatch.setattr(LLMRunnerFactory, "from_target", load_late)
    with pytest.raises(LLMInferenceError, match="tiny-chat.gguf was changed"):
        llmpipe.run(config_of(model, "backend=llama_cpp"), tmp_path / "run")
    with pytest.raises(llmpipe.LLMError, match="holds a run of another configuration: model was"):
        llmpipe.run(config_of(model, "backend=llama_cpp"), tmp_path / "run")


def test_a_chat_template_that_is_edited_meanwhile_ends_the_run(tmp_path: Path) -> None:
    template = Path(shutil.copy(BUNDLED_DIR / "chat_template.jinja", tmp_path))
    config = config_of(Path("bundled"), "backend=llama_cpp", f"backend.chat_template={template}")
    with pytest.raises(LLMInferenceError, match="chat_template.jinja was changed"):
        llmpipe.run(config, tmp_path / "run", at(5, lambda: template.touch()))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "renamed"])
def test_runs_that_are_killed_while_their_model_is_another_have_no_answer_of_it(how: str, tmp_path: Path) -> None:
    model, whole = tmp_path / "model.gguf", BUNDLED_DIR / "tiny-chat.gguf"
    asked = ["backend=llama_cpp", f"backend.model={model}", "sampling=greedy", "sampling.max_tokens=60", "seed=7"]
    asked += ["backend.reproducible=true", "backend.threads=1", "dataset.limit=150"]
    shutil.copy2(whole, model)
    llmpipe.run(compose(asked), tmp_path / "undisturbed")
    chance, directory = random.Random(7), tmp_path / "run"
    for _ in range(6):
        command = [sys.executable, "-m", "llmpipe", *asked, f"hydra.run.dir={directory}"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(1.0, 2.5))
        if how == "renamed":
            replace_weights(model)
        else:
            with model.open("r+b") as stream:
                stream.seek(2**20)
                stream.write(bytes(2**20))
        time.sleep(chance.uniform(0, 0.8))
        child.kill()
        child.wait()
        if how == "renamed":
            model.unlink()
        shutil.copy2(whole, model)
    llmpipe.run(compose(asked), directory)
    assert answers(directory) == answers(tmp_path / "undisturbed")
