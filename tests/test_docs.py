"""What the pages of docs/ and the scripts of examples/ say to run, runs."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


COMMANDS = [
    pytest.param(line, id=f"{page.relative_to(ROOT)}: {line}")
    for page in PAGES
    for block in blocks(page, "console")
    for line in block.splitlines()
]
PROGRAMS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)} {number}")
    for page in PAGES
    for number, block in enumerate(blocks(page, "python"))
    if "import llmpipe" in block or "from llmpipe import LLMRunnerFactory" in block
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with the example datasets, as a checkout has them."""
    shutil.copytree(ROOT / "data", tmp_path / "data")
    return tmp_path


def run(place: Path, *command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *command], cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_runs(place: Path, command: str) -> None:
    program, *arguments = shlex.split(command)
    assert program == "llmpipe"
    run(place, "-m", "llmpipe", *arguments)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_the_docs_runs(place: Path, program: str) -> None:
    run(place, "-c", program)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_an_example_runs(place: Path, script: Path) -> None:
    assert run(place, str(script)).stdout
