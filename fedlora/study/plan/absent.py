"""Runs of a study without a result: those that cannot exist, and those that failed; each has its reason."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedlora.config import StudyConfig
from fedlora.core.files import write_atomic
from fedlora.errors import FedLoraError, NotApplicable, RunFailed, first_line, named_line
from fedlora.study.plan.cells import Cell
from fedlora.study.plan.judged import check_cell

FAILED = "failed.json"
"""In a run's directory; there from its failure until it is retried."""
Why = Literal["not applicable", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """One run without a result.

    Attributes:
        label, group, method: those of its `Cell`.
        why: it cannot exist, or it was tried.
        reason: one line.
    """

    label: str
    group: str
    method: str
    why: Why
    reason: str

    @classmethod
    def of(cls, cell: Cell, why: Why, reason: str) -> Absent:
        """A cell's."""
        return cls(label=cell.label, group=cell.group, method=cell.method, why=why, reason=reason)


def applicable(cells: Iterable[Cell], study: StudyConfig) -> tuple[list[Cell], list[Absent]]:
    """The cells that can exist, and those that their rule, task, mode of privacy or the metric excludes.

    Raises:
        ConfigError: a cell with a mistake in it.
        NotApplicable: not one can exist.
    """
    possible: list[Cell] = []
    absent: list[Absent] = []
    for cell in cells:
        try:
            check_cell(study, cell.config)
        except NotApplicable as error:
            absent.append(Absent.of(cell, "not applicable", str(error)))
        else:
            possible.append(cell)
    if not possible:
        raise NotApplicable(f"study: no run can exist; {absent[0].label}: {absent[0].reason}")
    return possible, absent


def write_failure(directory: Path, error: Exception) -> str:
    """Record why a run stopped, with the traceback where nobody foresaw it; the one-line reason."""
    foreseen = isinstance(error, FedLoraError)
    reason = first_line(error) if foreseen else named_line(error)
    record = {"reason": reason}
    if not foreseen:
        record["traceback"] = "".join(traceback.format_exception(error))
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / FAILED, json.dumps(record, indent=2) + "\n")
    return reason


def read_failure(directory: Path) -> str | None:
    """Reason that the run there failed; None if it did not.

    Raises:
        RunFailed: the record cannot be read.
    """
    file = directory / FAILED
    try:
        return str(json.loads(file.read_text())["reason"]) if file.exists() else None
    except (ValueError, KeyError, TypeError):
        raise RunFailed(f"{file}: cannot be read, remove it to try the run again") from None
