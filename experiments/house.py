"""Picture of the code in ``docs/design.md``: rooms, floors and imports, made from the code itself.

python -m experiments.house
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from experiments.marked import remade
from fedlora.core.files import write_atomic

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "design.md"
PACKAGES = ("fedlora", "strategies", "clients")
STAND_INS = ("fedlora.strategies", "fedlora.clients")
"""Modules of a checkout that only give another name to a package beside them."""

Rooms = dict[str, set[str]]
"""A room (a package, or a module that lies beside packages) -> the rooms that it imports."""


def modules() -> Iterator[tuple[str, Path]]:
    """All modules of the product, by dotted name."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            name = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
            yield name.removesuffix(".__init__"), file


def rooms() -> Rooms:
    """Every room with those that it imports, lazily or for types alone included."""
    files = {name: file for name, file in modules() if name not in (*STAND_INS, "fedlora")}
    found: Rooms = {room_of(name): set() for name in files}
    for name, file in files.items():
        for target in imports(file):
            if target.split(".")[0] in PACKAGES and target != "fedlora":
                found[room_of(name)].add(room_of(target))
    return {room: targets - {room} for room, targets in found.items()}


def room_of(module: str) -> str:
    """The room of a module.

    >>> room_of("fedlora.study.report.charts"), room_of("strategies.rules.flora"), room_of("fedlora.errors")
    ('study', 'strategies', 'errors')
    """
    package, *rest = module.split(".")
    return rest[0] if package == "fedlora" and rest else package


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports anywhere; of ``from fedlora import wire`` the wire."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == "fedlora":
                yield from (f"fedlora.{alias.name}" for alias in node.names)
            else:
                yield node.module


def floors(graph: Rooms) -> list[list[str]]:
    """Rooms by floor, the lowest first; a room lies one floor above the highest that it imports.

    Raises:
        ValueError: rooms that import each other in a circle.
    """
    levels: dict[str, int] = {}
    while len(levels) < len(graph):
        free = [r for r, targets in graph.items() if r not in levels and targets <= levels.keys()]
        if not free:
            raise ValueError(f"a circle of imports among {sorted(graph.keys() - levels.keys())}")
        levels |= {room: 1 + max((levels[t] for t in graph[room]), default=-1) for room in free}
    return [sorted(r for r in levels if levels[r] == n) for n in range(max(levels.values()) + 1)]


def needed(graph: Rooms) -> Rooms:
    """The arrows that no longer way replaces: a transitive reduction."""
    reach: dict[str, set[str]] = {}
    for floor in floors(graph):
        for room in floor:
            reach[room] = graph[room].union(*(reach[target] for target in graph[room]))
    return {
        room: {t for t in targets if not any(t in reach[other] for other in targets - {t})}
        for room, targets in graph.items()
    }


def picture(graph: Mapping[str, set[str]] | None = None) -> str:
    """A Mermaid chart, the top floor first; arrows point at what is imported."""
    found = rooms() if graph is None else dict(graph)
    lines = ["```mermaid", "flowchart TD"]
    for number, floor in reversed(list(enumerate(floors(found)))):
        lines += [f"  subgraph floor{number}[ ]", "    direction LR"]
        lines += [f"    {room}" for room in floor] + ["  end"]
    lines += [f"  {room} --> {t}" for room, targets in sorted(needed(found).items()) for t in sorted(targets)]
    return "\n".join([*lines, "```"])


def main() -> None:
    """Write the picture into the page."""
    write_atomic(PAGE, remade(PAGE.read_text(), {"house": picture}))


if __name__ == "__main__":
    main()
