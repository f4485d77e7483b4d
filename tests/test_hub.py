"""A hub that does not answer is said to be so soon; what its cache has is used without it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmpipe.runners.weights import BUNDLED_DIR

COMMIT = "0" * 40
SOON_S = 5.0
CLASSES = {"llama_cpp": "LlamaCppRunner", "transformers": "TransformersRunner"}


@pytest.fixture(params=["refuses", "never answers"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a hub that is not there, or to which one can connect, and hears nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def seconds_to_load(backend: str, endpoint: str, home: Path) -> tuple[float, str]:
    """Load a hub model in a process of its own; return how long that took, imports aside, and what came of it."""
    program = f"""
import time, llmpipe, sys
from llmpipe.exceptions import LLMError
import huggingface_hub, {backend}
import llmpipe.runners.{backend}.runner
started = time.monotonic()
try:
    runner = llmpipe.runners.{backend}.runner.{CLASSES[backend]}({{"model": "owner/name"}}, "cpu")
    said = runner.generate_text("What is the capital of France?", max_tokens=5, temperature=0)
except LLMError as error:
    said = str(error)
print(time.monotonic() - started, said)
"""
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": ":".join(sys.path), "HOME": str(home)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    took, _, said = done.stdout.partition(" ")
    return float(took), said


@pytest.mark.parametrize("backend", ["llama_cpp", "transformers"])
def test_a_hub_that_does_not_answer_is_said_to_be_so_within_seconds_and_before_packages_are_imported(
    backend: str, endpoint: str, tmp_path: Path
) -> None:
    program = f"""
import sys, time, llmpipe
started = time.monotonic()
try:
    llmpipe.run(llmpipe.compose(["backend={backend}", "backend.model=owner/name", "dataset.limit=3"]), "out")
except llmpipe.LLMInitializationError as error:
    print({{"torch", "llama_cpp"}} & {{*sys.modules}}, time.monotonic() - started, error)
"""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.startswith("set() "), done
    _, took, said = done.stdout.split(" ", 2)
    assert float(took) < SOON_S
    assert said.startswith(f"cannot fetch 'owner/name': the hub {endpoint} does not answer") and said.count("\n") == 1


@pytest.mark.parametrize("backend", ["llama_cpp", "transformers"])
def test_a_model_in_the_cache_is_loaded_without_the_hub(backend: str, endpoint: str, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    names = shutil.ignore_patterns(*(["*.safetensors"] if backend == "llama_cpp" else ["*.gguf"]))
    shutil.copytree(BUNDLED_DIR, repository / "snapshots" / COMMIT, ignore=names)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    took, said = seconds_to_load(backend, endpoint, tmp_path)
    assert "Paris" in said and took < 4 * SOON_S  # a tokenizer is tried first


def test_an_answer_of_any_kind_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    from huggingface_hub import constants

    from llmpipe.runners import hub

    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # says 501
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        started = time.monotonic()
        assert hub.is_needed("owner/name", cached=False)
        assert time.monotonic() - started < 1
        server.shutdown()
