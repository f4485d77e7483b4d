"""Newcomers find their way: what lists the files of a folder names each of them, and none that is gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llmpipe

PACKAGE = Path(llmpipe.__file__).parent
FOLDERS = [file.parent for file in sorted(PACKAGE.rglob("*/__init__.py"))]


def modules(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.py")} - {"__init__.py"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_a_folder_says_what_each_of_its_files_is_for(folder: Path) -> None:
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    lists = [line for line in said.splitlines() if re.match(r"\w+\.py\b", line)]
    assert set(re.findall(r"\b\w+\.py\b", "\n".join(lists))) == modules(folder)


def test_the_architecture_names_every_room_at_the_top() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rooms = page.partition("## The rooms")[2].partition("## The path of a row")[0]
    folders = {f"{folder.name}/" for folder in FOLDERS if folder.parent == PACKAGE} | {"models/"}
    table = "\n".join(line for line in rooms.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+(?:\.py|/))`", table)) == modules(PACKAGE) | folders
