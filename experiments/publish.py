"""Keeps a study's finished cells in the repository, and puts them back to go on with it.

    python -m experiments.publish pack runs/privacy experiments/published/privacy
    python -m experiments.publish unpack experiments/published/privacy runs/privacy
    fedlora compare experiments/privacy.toml --out runs/privacy --resume

``cells.jsonl`` holds one line for each finished cell: its configuration, rounds, result and provenance.
Adapters and checkpoints stay behind. What stands there already is never overwritten by another result.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fedlora.core.files import write_atomic
from fedlora.server.results import RESULT
from fedlora.study.analyse.results import FILES

CELLS = "cells.jsonl"


def pack(study: Path, published: Path) -> int:
    """Add the finished cells of a study's directory; returns how many there are now."""
    known = read(published)
    for result in sorted(study.glob(f"*/{RESULT}")):
        cell = {name: (result.parent / name).read_text() for name in FILES}
        label = result.parent.name
        if known.setdefault(label, cell)[RESULT] != cell[RESULT]:
            raise SystemExit(f"{label}: another result stands in {published / CELLS}, remove one of the two")
    published.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"label": label, **cell}) for label, cell in sorted(known.items()))
    write_atomic(published / CELLS, "".join(f"{line}\n" for line in lines))
    return len(known)


def unpack(published: Path, study: Path) -> int:
    """Write the kept cells as run directories, those that are not there; returns how many were written."""
    written = 0
    for label, cell in read(published).items():
        home = study / label
        if (home / RESULT).exists():
            continue
        home.mkdir(parents=True, exist_ok=True)
        for name in sorted(FILES, key=lambda name: name == RESULT):
            write_atomic(home / name, cell[name])
        written += 1
    return written


def read(published: Path) -> dict[str, dict[str, str]]:
    """Label -> name of a file -> its text; empty where nothing is kept."""
    path = published / CELLS
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [json.loads(line) for line in lines]
    return {cell.pop("label"): cell for cell in cells}


def main(arguments: list[str]) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args(arguments)
    if not given.source.is_dir():
        parser.error(f"{given.source}: there is no such directory")
    count = (pack if given.what == "pack" else unpack)(given.source, given.target)
    print(f"{count} cells in {given.target}" if given.what == "pack" else f"{count} cells written")


if __name__ == "__main__":
    main(sys.argv[1:])
