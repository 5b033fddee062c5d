"""What makes examples of the rows of the data, where a row is not one by itself.

A block of 256 tokens is 32 blocks of 8: an epsilon that adds up releases for both holds for neither.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

KEYS = {"task": "task", "max_length": "data.max-length", "tokenizer": "model.name, tokenizer"}
"""Attribute of a `Cut` -> the key behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Settings by which examples are made of rows; what plays no part is left empty.

    Attributes:
        task: of the run; empty where each row is one example.
        max_length: ``data.max-length``.
        tokenizer: a digest of it.
    """

    task: str = ""
    max_length: int = 0
    tokenizer: str = ""

    def record(self) -> dict[str, Any]:
        """The settings that play a part, for a line of a ledger."""
        return {name: value for name, value in asdict(self).items() if value}


ROWS = Cut()
"""Each row is an example."""


def read_cut(record: object) -> Cut | None:
    """The cut of a `Cut.record`; None where it is none."""
    if not isinstance(record, dict):
        return None
    match {**asdict(ROWS), **record}:
        case {"task": str(task), "max_length": int(max_length), "tokenizer": str(tokenizer)}:
            return Cut(task=task, max_length=max_length, tokenizer=tokenizer)
    return None


def unlike(cut: Cut | None, other: Cut | None) -> tuple[str, str] | None:
    """The first setting in which two cuts differ, as each has it; None where they are not known to differ.

    None stands for one of which nobody wrote down what it was.
    """
    if cut is None or other is None or cut == other:
        return None
    name = next(name for name in KEYS if getattr(cut, name) != getattr(other, name))
    return _said(cut, name), _said(other, name)


def _said(cut: Cut, name: str) -> str:
    return f"{KEYS[name]} = {getattr(cut, name)!r}" if cut.task else "a task whose examples are rows"
