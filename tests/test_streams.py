"""What is printed, where the standard streams are closed, full, unread, or of an encoding that lacks characters."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpipe import read_run
from llmpipe.runners.weights import BUNDLED_DIR
from llmpipe.system.streams import SPELT_OUT, usable_streams

ROWS = [{"id": "naïve", "prompt": "漢字 … → 🙂"}, {"id": "b", "prompt": "plain"}]
NOISY = """
import os
from llmpipe import Chunk, EchoRunner
class Noisy(EchoRunner):
    def stream(self, requests):
        for chunk in super().stream(requests):
            for number in (1, 2):
                try: os.write(number, b"NOISE " * 100)
                except OSError: pass
            yield chunk
"""


@pytest.fixture
def rows(write_jsonl: Callable[..., Path]) -> Path:
    return write_jsonl(*ROWS)


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line in which `llmpipe` is the command; the exit code is that of llmpipe, not of what it is piped into."""
    line = line.replace("llmpipe", f"{sys.executable} -m llmpipe")
    started = ["bash", "-o", "pipefail", "-c", line]
    path = os.pathsep.join([*filter(None, sys.path), str(cwd)])
    return subprocess.run(
        started, cwd=cwd, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, timeout=120
    )


def answers(directory: Path) -> list[str]:
    lines = (directory / "outputs.jsonl").read_bytes().splitlines()
    return [json.loads(line)["completion"] for line in lines]


FOREIGN = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "c": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_terminal_of_another_encoding_shows_what_it_can_and_files_are_as_ever(
    name: str, rows: Path, tmp_path: Path
) -> None:
    asked = f"backend=echo dataset.path={rows} hydra.run.dir=out"
    planned = shell(f"llmpipe plan {asked}", tmp_path, **FOREIGN[name])
    assert (planned.returncode, planned.stderr) == (0, b"")
    assert b"######" in planned.stdout and rb"\u6f22\u5b57" in planned.stdout
    if name == "c":  # the locale is also that of the files
        assert shell(f"llmpipe {asked}", tmp_path, **FOREIGN[name]).returncode == 0
        assert answers(tmp_path / "out") == [row["prompt"] for row in ROWS]


def test_help_is_shown_in_ascii(tmp_path: Path) -> None:
    done = shell("llmpipe --help", tmp_path, **FOREIGN["ascii"])
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"..." in done.stdout and b"\\u" not in done.stdout


@pytest.mark.parametrize("asked", ["--help", "plan", ""])
def test_a_reader_who_leaves_changes_nothing(asked: str, rows: Path, tmp_path: Path) -> None:
    done = shell(f"llmpipe {asked} backend=echo dataset.path={rows} hydra.run.dir=out | true", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    if not asked:
        assert len(answers(tmp_path / "out")) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(("asked", "code"), [("--help", 1), ("dataset.limit=1", 0)])
def test_a_full_output_is_said_and_fails_only_what_was_to_be_printed(
    asked: str, code: int, rows: Path, tmp_path: Path
) -> None:
    done = shell(f"llmpipe backend=echo dataset.path={rows} hydra.run.dir=out {asked} >/dev/full", tmp_path)
    assert done.returncode == code
    assert done.stderr.decode() == "llmpipe: the standard output could not be written: No space left on device\n"


SWEEP = "-m seed=1,2 hydra.sweep.dir=sweep"
JOBLIB = f"{SWEEP} hydra/launcher=joblib hydra.launcher.n_jobs=2"
STREAMS = [">&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | head -0", "2>/dev/full"]
ASKED = ["hydra.run.dir=out", JOBLIB, SWEEP, "plan hydra.run.dir=out", "hydra.run.dir=out max_error_rate=0.1"]
AT_ONCE = [*((ASKED[0], streams) for streams in STREAMS), (JOBLIB, STREAMS[0])]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("asked", "streams"),
    [
        pytest.param(*case, marks=[] if case in AT_ONCE else pytest.mark.slow)
        for case in itertools.product(ASKED, STREAMS)
    ],
)
def test_what_a_command_does_does_not_depend_on_its_streams(
    asked: str, streams: str, rows: Path, tmp_path: Path
) -> None:
    done = shell(f"llmpipe {asked} backend=echo dataset.path={rows} {streams}", tmp_path)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    found = [tmp_path / "sweep/0", tmp_path / "sweep/1"] if "sweep" in asked else [tmp_path / "out"]
    for directory in found:
        assert (directory / "plan.json").exists() if "plan" in asked else len(answers(directory)) == 2
    if asked == "hydra.run.dir=out":
        exported = shell(f"llmpipe export out {streams}", tmp_path)
        assert exported.returncode == 0 and len((tmp_path / "out/partial.jsonl").read_bytes().splitlines()) == 2


def test_a_pipe_that_does_not_wait_for_its_reader_gets_all(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen([sys.executable, "-m", "llmpipe", "--help"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    time.sleep(0.5)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    assert (process.communicate()[1], process.returncode) == (b"", 0)
    assert len(said) > 10_000 and said.endswith(b"\n")


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_closed_streams_are_no_place_for_files_of_the_run(closed: str, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    own = "backend=echo backend._target_=noisy.Noisy trusted_modules=[noisy]"
    assert shell(f"llmpipe {own} dataset.path={rows} hydra.run.dir=out {closed}", tmp_path).returncode == 0
    assert answers(tmp_path / "out") == [row["prompt"] for row in ROWS]
    assert not [file for file in tmp_path.glob("out/**/*") if file.is_file() and b"NOISE" in file.read_bytes()]


def test_a_model_and_a_directory_whose_names_are_no_utf8_are_named_as_well_as_can_be(
    rows: Path, tmp_path: Path
) -> None:
    model, directory = tmp_path / os.fsdecode(b"m\xff.gguf"), tmp_path / os.fsdecode(b"out\xff")
    try:
        shutil.copy(BUNDLED_DIR / "tiny-chat.gguf", model)
    except OSError:
        pytest.skip("this file system knows no such names")
    asked = f"'backend.model=\"{model}\"' dataset.path={rows} sampling.max_tokens=2 'hydra.run.dir=\"{directory}\"'"
    done = shell(f"llmpipe {asked}", tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert rb"out\udcff" in done.stdout
    assert read_run(directory).metrics["runner"]["model"] == str(model)


@given(
    text=st.text(), encoding=st.sampled_from(["ascii", "latin-1", "cp1252", "cp437", "shift_jis", "gb18030", "utf-8"])
)
def test_every_text_can_be_written_in_every_encoding(text: str, encoding: str) -> None:
    shown = text.encode(encoding, SPELT_OUT).decode(encoding)
    assert text.encode("ascii", SPELT_OUT).isascii()
    if text.isascii():
        assert shown == text


def test_streams_that_a_program_put_in_place_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", own := io.StringIO())
    with usable_streams():
        assert sys.stdout is own
        print("here", end="")
    assert own.getvalue() == "here"
