"""The README's commands and code do what it says; the tests and options that the pages of docs/ name are there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from hydra.conf import HydraConf

from llmpipe.config import BACKENDS, RunConfig, SamplingConfig, conf_dir

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("console") for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "llmpipe"
    shutil.copytree(ROOT / "data", tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-m", "llmpipe", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("outputs/**/metrics.json"))


def test_the_library_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = [block for block in blocks("python") if "create_runner" in block]
    exec(compile(example, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out


def test_the_backend_example_runs_a_dataset(tmp_path: Path) -> None:
    (example,) = [block for block in blocks("python") if "ShoutRunner" in block]
    (tmp_path / "shout.py").write_text(example)
    (command,) = re.findall(r"`(llmpipe backend=echo backend\._target_=\S+ \S+)`", README)
    arguments = [*shlex.split(command)[1:], "dataset.limit=3", "hydra.run.dir=out"]
    done = subprocess.run(
        [sys.executable, "-m", "llmpipe", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "outputs.jsonl").read_text().count("\n") == 3


def test_options_named_in_the_table_exist() -> None:
    for group in ("backend", "sampling", "dataset", "prompt", "output"):
        assert f"`{group}=" in README
        assert all(option.stem in README for option in (conf_dir() / group).glob("*.yaml"))
    named = set(re.findall(r"`\.(\w+)=", README))
    assert named <= {*SamplingConfig.__dataclass_fields__, *RunConfig.__dataclass_fields__}


def test_the_figures_are_filled_in() -> None:
    assert "<!-- figures" not in README


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_of_the_docs_is_linked_and_names_tests_and_options_that_exist(page: Path) -> None:
    text = page.read_text()
    assert f"](docs/{page.name})" in README
    tests = set(re.findall(r"`(tests/\S+?)`", text))
    assert {name for name in tests if not (ROOT / name).is_file()} == set()
    for option in re.findall(r"`([a-z_.]+)=", text):
        group, _, name = option.partition(".")
        if group == "backend" and name:
            assert any(hasattr(schema, name) for schema in BACKENDS.values()), option
        else:
            attrgetter(name if group == "hydra" else option)(HydraConf() if group == "hydra" else RunConfig())
