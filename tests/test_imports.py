"""Which way imports run: read from the source, so those inside of functions and for type checkers count as well."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llmpipe

PACKAGE = Path(llmpipe.__file__).parent
LAYERS = (
    {"cli"},
    {"pipeline"},
    {"datasets", "prompts", "ledger", "outputs", "metrics", "scorers", "report", "runners"},
    {"config", "records", "exceptions"},
)
"""Rooms, each of which imports of those named here only what stands below it; the last may import each other."""

Graph = dict[str, set[str]]


def imports(package: Path) -> Graph:
    """Return what each module of a package imports of it, by whatever means, but for the packages that it is in."""
    files = {".".join(file.relative_to(package.parent).with_suffix("").parts): file for file in package.rglob("*.py")}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    graph: Graph = {}
    for module, file in files.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                named.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}:{node.lineno}: relative imports are not followed here"
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                named.update(name if name in files else str(node.module) for name in inner)
        graph[module] = named & files.keys()
    return graph


def rooms(graph: Graph) -> Graph:
    """Return what each file or folder at the top of the package imports of the others."""
    top: Graph = {}
    for module, imported in graph.items():
        room = _room(module)
        top.setdefault(room, set()).update(other for other in map(_room, imported) if other != room)
    return top


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def circle(graph: Graph) -> list[str]:
    """Return modules of which each imports the one before it, from the first to itself; none where there is no such."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def reached(graph: Graph, start: str) -> set[str]:
    """Return what is imported by way of others, too."""
    found: set[str] = set()
    new = {start}
    while new:
        new = {other for one in new for other in graph[one]} - found
        found |= new
    return found


def test_modules_do_not_import_each_other_in_a_circle_and_neither_do_rooms() -> None:
    graph = imports(PACKAGE)
    assert len(graph) > 100 and graph["llmpipe.cli"]
    assert circle(graph) == []
    assert circle(rooms(graph)) == []


@pytest.mark.parametrize(
    "hidden", ["def f():\n    from a.one import x", "if TYPE_CHECKING:\n    from a import one", "import a.one"]
)
def test_a_circle_that_is_hidden_from_the_interpreter_is_found(hidden: str, tmp_path: Path) -> None:
    package = tmp_path / "a"
    package.mkdir()
    for name, text in {"__init__": "", "one": "from a.two import y", "two": hidden}.items():
        (package / f"{name}.py").write_text(text)
    assert set(circle(imports(package))) == {"a.one", "a.two"}


def test_imports_run_from_the_command_to_what_describes_and_not_between_siblings() -> None:
    graph = rooms(imports(PACKAGE))
    for number, layer in enumerate(LAYERS):
        above = set().union(*LAYERS[: number + 1]) - (layer if layer is LAYERS[-1] else set())
        for room in layer:
            assert not reached(graph, room) & above, room
