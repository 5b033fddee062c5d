"""Cells that are finished already, here or in another study: known by their identity, and taken over.

Two cells are the same where they have the same keys (but those without effect), today's code computed the one
that is finished, and both are given the same weights and examples. Labels, studies and engines do not matter.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedlora.core.files import new_directory, write_atomic
from fedlora.core.sealed import sealed
from fedlora.errors import ConfigError, FedLoraError, first_line
from fedlora.server.directory import CHECKPOINT, SPOILED
from fedlora.server.identity import code_digest, code_of, config_digest, recorded
from fedlora.server.provenance import PROVENANCE, check_schema, read_provenance
from fedlora.server.results import BEFORE, SAMPLES
from fedlora.server.resumed import other_inputs
from fedlora.study.analyse.results import FILES, TAKEN_FROM, finished, load_result
from fedlora.study.execute.cell import Engine
from fedlora.study.plan.absent import read_failure
from fedlora.study.plan.cells import Cell

STUDY = "study.json"
"""In a study's directory: what wrote it, and the rates that it tuned."""
Say = Callable[[str], None]


def others_beside(path: Path, say: Say) -> list[Path]:
    """The directories of other studies beside one; one that cannot be read is said and left out."""
    own = Path(os.path.abspath(path))
    found = []
    for file in sorted(own.parent.glob(f"*/{STUDY}")):
        try:
            check_schema(file)
        except (ConfigError, OSError) as error:
            reason = first_line(error).removesuffix("; use another --out")
            say(f"nothing is taken from {file.parent.name}: {reason}")
        else:
            found.append(file.parent)
    return [study for study in found if study != own]


def check_shared(directories: Iterable[Path]) -> None:
    """Refuse what is no study's directory, or one of another schema.

    Raises:
        ConfigError: it is.
    """
    for directory in directories:
        if not (directory / STUDY).is_file():
            raise ConfigError(f"--share {directory}: is no directory of a study, there is no {STUDY} in it")
        check_schema(directory / STUDY)


class ResultCache:
    """Cells of this and of other studies, by the digest of their keys.

    Args:
        cells: those of this study.
        path: its directory.
        others: directories of other studies.
        say: is told about a cell that would do and cannot be read.
    """

    def __init__(self, cells: Sequence[Cell], path: Path, others: Sequence[Path], say: Say) -> None:
        self._say = say
        self._homes: dict[str, list[Path]] = {}
        for cell in cells:
            self._homes.setdefault(config_digest(cell.config), []).append(path / cell.label)
        for file in (file for other in others for file in sorted(other.glob(f"*/{PROVENANCE}"))):
            found = recorded(read_provenance(file))
            if found is not None:
                self._homes.setdefault(found.config, []).append(file.parent)

    def find(self, cell: Cell, inputs: Callable[[], str | None]) -> Path | None:
        """Directory of a finished cell that is the same as one that was not begun.

        Args:
            cell: of this study.
            inputs: what it would be given; asked only where a finished cell has its keys and today's code.
        """
        for home in self._homes[config_digest(cell.config)]:
            found = recorded(read_provenance(home / PROVENANCE))
            if found is None or found.code != code_digest() or found.inputs is None:
                continue
            if self._is_whole(cell, home) and found.inputs == inputs():
                return home
        return None

    def _is_whole(self, cell: Cell, home: Path) -> bool:
        """The cell there is finished, can be read, and would come out like that again."""
        if not finished(home) or (home / SPOILED).exists():
            return False
        try:
            return bool(load_result(cell, home).result.get("reproducible", True))
        except (FedLoraError, OSError, ValueError) as error:
            self._say(f"{cell.label}: nothing is taken from {home} ({first_line(error)})")
            return False


def take(source: Path, home: Path) -> None:
    """Copy a finished cell without adapter, checkpoint and what clients hold; its provenance says whence."""
    record = read_provenance(source / PROVENANCE)
    record.setdefault(TAKEN_FROM, "/".join(Path(os.path.abspath(source)).parts[-2:]))
    with new_directory(home) as draft:
        for name in (*FILES, BEFORE, SAMPLES):
            if (source / name).exists():
                shutil.copyfile(source / name, draft / name)
        write_atomic(draft / PROVENANCE, json.dumps(sealed(record), indent=2) + "\n")


def check_inputs(engine: Engine, cells: Sequence[Cell], path: Path, *, retry_failed: bool = False) -> None:
    """Refuse to run cells beside others of the study that were given other examples or weights.

    Nothing is read where none is to run.

    Raises:
        ConfigError: there are such others.
    """
    waiting = [cell for cell in cells if not finished(path / cell.label)]
    if all(read_failure(path / cell.label) is not None and not retry_failed for cell in waiting):
        return
    known: dict[str, Cell] = {}
    for cell in cells:
        home = path / cell.label
        found = recorded(read_provenance(home / PROVENANCE))
        if found is not None and found.last_inputs and (finished(home) or (home / CHECKPOINT).exists()):
            known.setdefault(found.last_inputs, cell)
    for inputs, cell in known.items():
        if not engine.gives(cell.config, path / cell.label, inputs):
            raise other_inputs(cell.config, path / cell.label)


def by_other_code(cells: Iterable[Cell], path: Path) -> int:
    """Number of finished cells that other code than today's computed, or such as nobody recorded."""
    homes = [path / cell.label for cell in cells if finished(path / cell.label)]
    return sum(code_of(read_provenance(home / PROVENANCE)) != code_digest() for home in homes)
