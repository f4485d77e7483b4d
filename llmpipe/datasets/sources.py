"""What `dataset.path` names → files: a file, a directory, a glob, or a list of them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from llmpipe.config.checks import is_remote, readable
from llmpipe.datasets.formats import READERS, suffix_of
from llmpipe.exceptions import DatasetError

_NULL = "__HIVE_DEFAULT_PARTITION__"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_NOT_YET = "is not supported yet: download it first, and name the files that are then on this machine"


class Source(NamedTuple):
    """A file, and what its path says of its rows."""

    path: Path
    columns: dict[str, Any]
    """Columns that stand in the names of its directories, such as `lang=en`."""
    streamed: bool = False
    """Whether it is the copy of a stream, whose name says nothing about its format."""


def sources_of(path: str, copy: Path | None = None) -> list[Source]:
    """Return the files that one path names, in order.

    Args:
        path: As `dataset.path` has it.
        copy: The copy to read instead, where the path names a stream.

    Raises:
        DatasetError: it names none.
    """
    if copy is not None:
        return [Source(copy, {}, streamed=True)]
    with readable("dataset.path", path, DatasetError):
        return _found(path)


def _found(path: str) -> list[Source]:
    file = Path(path).expanduser()
    if file.is_file():
        return [Source(file, {})]
    if path and file.is_dir():  # "" is a variable of a shell's that was not set
        return _with_columns(file, _inside(path, file))
    if is_remote(path):
        raise DatasetError(f"dataset.path={path!r} {_NOT_YET}")
    if any(character in path for character in "*?["):
        found = sorted(file for file in map(Path, glob.glob(str(file), recursive=True)) if file.is_file())
        if not found:
            raise DatasetError(f"dataset.path={path!r} matches no file (from {Path.cwd()})")
        fixed = [part for part in file.parts]
        wild = next(i for i, part in enumerate(fixed) if any(character in part for character in "*?["))
        return _with_columns(Path(*fixed[:wild]), found)
    if _HUB_ID.fullmatch(path) and suffix_of(file) not in READERS and not file.parent.is_dir():
        raise DatasetError(
            f"dataset.path={path!r} is no file here (from {Path.cwd()}), and a dataset of a hub {_NOT_YET}"
        )
    raise DatasetError(
        f"dataset.path={path!r} does not exist (from {Path.cwd()}); it must be a file, a directory, a glob or a list "
        f"of them"
    )


def _inside(path: str, directory: Path) -> list[Path]:
    """Return the files of a directory and those below it, but for the hidden ones."""
    os.scandir(directory).close()  # which raises where `rglob` would find nothing
    found = [
        file
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        and suffix_of(file) in READERS
        and not any(part.startswith((".", "_")) for part in file.relative_to(directory).parts)
    ]
    kinds = sorted({suffix_of(file) for file in found})
    if not kinds:
        raise DatasetError(f"dataset.path={path!r} is a directory without a file of a known type: {', '.join(READERS)}")
    if len(kinds) > 1:
        raise DatasetError(
            f"dataset.path={path!r} is a directory with files of several types: {', '.join(kinds)}; choose with a "
            f"glob, such as dataset.path='{path}/**/*{kinds[0]}'"
        )
    return found


def _with_columns(above: Path, files: Iterable[Path]) -> list[Source]:
    """Return files with the columns that the directories below `above` name, as Hive writes them."""
    found = [Source(file, _columns(file.relative_to(above).parts[:-1])) for file in files]
    for name in {name for source in found for name in source.columns}:
        values = [source.columns.get(name) for source in found]
        if all(value is None or re.fullmatch(r"0|-?[1-9]\d{0,17}", value) for value in values):
            for source in found:
                if source.columns.get(name) is not None:
                    source.columns[name] = int(source.columns[name])
    return found


def _columns(directories: Iterable[str]) -> dict[str, Any]:
    pairs = (part.split("=", 1) for part in directories if "=" in part[1:])
    return {unquote(name): None if value == _NULL else unquote(value) for name, value in pairs}
