"""Writes tables into the pages of docs/ when they are built.

`<!-- options: dataset -->` becomes that group's options, and `<!-- figures -->` the figures of `metrics.json`. MkDocs
calls `on_page_markdown`, a hook in mkdocs.yml. The tables come from where the program has them, the dataclasses in
`llmpipe/config/` and `llmpipe/figures.py`, so that no page can fall behind.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from llmpipe.config import BACKENDS, BackendConfig, RunConfig, field_docs
from llmpipe.config.options import default_of
from llmpipe.figures import FIGURES

MARK = re.compile(r"<!-- (?:options: ([\w-]+)|figures) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with the tables that its marks ask for."""
    return MARK.sub(lambda mark: options(mark[1]) if mark[1] else figures(), markdown)


def figures() -> str:
    """Return the figures of `metrics.json` as a table."""
    rows = [f"| `{figure.key}` | {figure.definition} |" for figure in FIGURES]
    return "\n".join(["| figure | what it is |", "|---|---|", *rows])


def options(name: str) -> str:
    """Return the options of a group of `RunConfig`, of a backend, or of the run itself (`run`), as a table."""
    if name == "run":
        rows = [row for row in rows_of(RunConfig) if "." not in row[0] and row[0] != "backend"]
    elif name == "backend":
        rows = rows_of(BackendConfig, "backend.")
    else:
        schemas = {backend.group: schema for backend, schema in BACKENDS.items()}
        if name in schemas:
            shared = rows_of(BackendConfig, "backend.")
            rows = [row for row in rows_of(schemas[name], "backend.") if row not in shared]
        else:
            rows = rows_of(type(getattr(RunConfig(), name)), f"{name}.")
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *map(line, rows)])


def rows_of(owner: type[Any], prefix: str = "") -> list[tuple[str, Any, str]]:
    """Return key, default and meaning of each option below a dataclass."""
    found: list[tuple[str, Any, str]] = []
    docs = field_docs(owner)
    for field in fields(owner):
        default, key = default_of(field), f"{prefix}{field.name}"
        if is_dataclass(default):
            found += rows_of(type(default), f"{key}.")
        elif field.name != "_target_":
            found.append((key, default, docs[field.name]))
    return found


def line(row: tuple[str, Any, str]) -> str:
    """Return a row of a table."""
    key, default, doc = row
    value = default.value if isinstance(default, Enum) else default
    if value == "???":
        shown = "required"
    else:
        names = {None: "null", True: "true", False: "false"}
        shown = f"`{names[value] if value is None or isinstance(value, bool) else value if value != '' else '(empty)'}`"
    cells = [f"`{key}`", shown, re.sub(r"([<>\[\]*_])", r"\\\1", doc)]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
