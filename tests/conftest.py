"""Shared fixtures. The echo runner stands in where a test is not about a backend; the models are real elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from traps import Said, lay

from llmpipe import BaseLLMRunner, Chunk, EchoRunner, LLMRunnerFactory, Request, RunConfig, compose
from llmpipe.runners.weights import BUNDLED_DIR

BACKENDS = ["llama_cpp", "transformers"]

# The same examples each time, so that a change is judged by itself; `make slow` looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what is remembered of models away from the user's own cache."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory))
        yield directory


@pytest.fixture(scope="session")
def llama_cpp_runner() -> Iterator[BaseLLMRunner]:
    with LLMRunnerFactory.create_runner({"backend": "llama_cpp", "temperature": 0.0, "threads": 1}) as runner:
        yield runner


@pytest.fixture(scope="session")
def transformers_runner() -> Iterator[BaseLLMRunner]:
    with LLMRunnerFactory.create_runner(
        {"backend": "transformers", "temperature": 0.0, "device": "cpu", "threads": 1}
    ) as runner:
        yield runner


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """Find a model or a data file that others made, below one of the directories in LLMPIPE_REAL."""

    def find(name: str) -> Path:
        for directory in filter(None, os.environ.get("LLMPIPE_REAL", "").split(os.pathsep)):
            for found in sorted(Path(directory).rglob(name)):
                return found
        pytest.skip(f"{name} is not below a directory in LLMPIPE_REAL")

    return find


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the bundled model as a directory for transformers."""
    return Path(shutil.copytree(BUNDLED_DIR, tmp_path / "copy", ignore=shutil.ignore_patterns("*.gguf")))


@pytest.fixture(params=BACKENDS)
def runner(request: pytest.FixtureRequest) -> BaseLLMRunner:
    """The bundled model, on each backend in turn; greedy by default."""
    found: BaseLLMRunner = request.getfixturevalue(f"{request.param}_runner")
    return found


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or bytes as they are) to a JSONL file and return its path."""

    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def echo_config() -> Callable[..., RunConfig]:
    """Compose a run of the echo backend over a dataset file, with further overrides."""

    def make(path: Path | str, *overrides: str) -> RunConfig:
        return compose(["backend=echo", f"dataset.path={path}", *overrides])

    return make


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    """The requests that reach the runner, as row and samples."""
    requests: list[tuple[int, tuple[int, ...]]] = []
    stream = EchoRunner.stream

    def noting(self: EchoRunner, given: Iterable[Request]) -> Iterator[Chunk]:
        def noted() -> Iterator[Request]:
            for request in given:
                requests.append((request.id, request.samples))
                yield request

        yield from stream(self, noted())

    monkeypatch.setattr(EchoRunner, "stream", noting)
    return requests


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with traps in it; modules are found there, as `python -m llmpipe` finds them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    lay(tmp_path)
    return tmp_path


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    """Run a command in this process; return its exit code and what it has said on stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        from llmpipe.cli import main

        capfd.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capfd.readouterr().err

    return run
