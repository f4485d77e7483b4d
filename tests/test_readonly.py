"""A read-only system, of which the run directory alone can be written, for a user that nobody knows, without a home."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmpipe.runners.weights import BUNDLED_DIR

UID = "12345"
SETUP = """
mount --bind {writable} {writable} && mount -o bind,remount,ro / || exit 99
for place in /dev/shm /tmp /var/tmp /run; do mount -o bind,remount,ro $place; done 2>/dev/null
cd / && exec setpriv --reuid={uid} --regid={uid} --clear-groups --inh-caps=+dac_read_search \\
  --ambient-caps=+dac_read_search env -i PATH=/usr/bin:/bin PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1 "$@"
"""
"""Reads everything, for Python and the tests may be anywhere, and writes in one directory."""


@pytest.fixture(scope="module")
def writable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("writable")
    directory.chmod(0o777)
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("needs unshare and setpriv")
    check = f"import os; assert not os.access('/tmp', os.W_OK); open('{directory}/ok', 'w').close()"
    done = confined(directory, sys.executable, "-c", check)
    if done.returncode:
        pytest.skip(f"a read-only system cannot be made here: {done.stderr.strip()}")
    return directory


def confined(writable: Path, *command: str) -> subprocess.CompletedProcess[str]:
    script = SETUP.format(writable=writable, uid=UID, path=os.pathsep.join([os.getcwd(), *filter(None, sys.path)]))
    started = ["unshare", "-m", "bash", "-c", script, "confined", *command]
    return subprocess.run(started, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("backend", ["llama_cpp", "transformers"])
def test_a_model_of_ones_own_runs(backend: str, writable: Path, tmp_path: Path) -> None:
    model = shutil.copy(BUNDLED_DIR / "tiny-chat.gguf", tmp_path)  # not known, so probed, which nothing can remember
    run = [f"backend={backend}", f"backend.model={model}", "dataset.limit=2", f"hydra.run.dir={writable / backend}"]
    done = confined(writable, sys.executable, "-m", "llmpipe", *run)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (writable / backend / "outputs.jsonl").read_text().splitlines()]
    assert [row["score_exact_match"] for row in rows] == [1, 1]
    assert not [entry.name for entry in (writable / backend).iterdir() if entry.is_dir() and entry.name != ".hydra"]


def test_what_only_prints_works_and_what_has_no_place_is_refused_in_a_line(writable: Path) -> None:
    assert confined(writable, sys.executable, "-m", "llmpipe", "--cfg", "job").returncode == 0
    directory = f"hydra.run.dir={writable / 'home'}"
    for given, said in (
        ([], "cannot write to the run directory"),
        (["dataset.path='~/x'", directory], "does not exist"),
    ):
        done = confined(writable, sys.executable, "-m", "llmpipe", "backend=echo", *given)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert said in done.stderr
