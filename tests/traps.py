"""What shows that code of somebody else has run: a file that leaves a mark where it is unpickled or imported."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Said = Callable[..., tuple[int, str]]
"""Runs a command in this process and returns its exit code and what it has said on stderr."""


class Mark:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def lay(place: Path) -> None:
    """Make a dataset, pickles and a module that leave `owned` where they are read, and a file nothing may change."""
    (place / "rows.jsonl").write_text('{"id": "a", "prompt": "say a"}\n')
    (place / "evil.pkl").write_bytes(pickle.dumps(Mark(place / "owned")))
    np.save(place / "evil.npy", np.array([Mark(place / "owned")], dtype=object), allow_pickle=True)
    (place / "evilmodule.py").write_text(f"import os\nos.mkdir({str(place / 'owned')!r})\nHandler = print\n")
    (place / "precious").write_text("mine")


def check_refused(place: Path, outcome: tuple[int, str]) -> None:
    """See that a command has refused in one line, and neither run any code nor written anything."""
    code, error = outcome
    assert not (place / "owned").exists() and not (place / "elsewhere").exists()
    assert (place / "precious").read_text() == "mine" and not (place / "out").exists()
    assert code == 1
    assert error.startswith("llmpipe: ") and error.count("\n") == 1, error
