"""Shows progress to people: a bar on a terminal and in a notebook, one plain line a round elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SHOWN = (
    ("perplexity", 2), ("accuracy", 3), ("f1_micro", 3), ("f1_macro", 3),
    ("rmse", 4), ("r2", 3), ("epsilon", 3),
)  # fmt: skip
"""Keys of a record that are shown, and with how many decimals."""
REASONS = 3
"""Refusals of a round that are told with their reasons; all are in ``rounds.jsonl``."""


def _console() -> Console:
    """Standard error, to which titles and reasons are printed letter for letter."""
    return Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)


def tell_wait(what: str) -> None:
    """Say on a terminal what is being waited for."""
    console = _console()
    if console.is_terminal:
        console.print(what, style="dim")


class NotebookBar:
    """A bar in the output of a notebook's cell, where rich's own would need widgets."""

    def add_task(self, description: str, *, total: int, status: str) -> TaskID:
        """The one task; it is shown when its progress begins."""
        self._title, self._total, self._done, self._status = description, total, 0, status
        return TaskID(0)

    def start(self) -> None:
        """Show it."""
        from IPython.display import display

        self._began = time.monotonic()
        self._shown = display(self, display_id=True)

    def update(
        self, task: TaskID, *, completed: int | None = None, status: str = "", description: str = ""
    ) -> None:
        """Show so many rounds of it as done; what is not given stays."""
        self._done = self._done if completed is None else completed
        self._status, self._title = status or self._status, description or self._title
        self._shown.update(self)

    def stop(self) -> None:
        """Leave it as it is."""

    def _repr_html_(self) -> str:
        seconds = time.monotonic() - self._began
        return (
            f'{escape(self._title)} <progress value="{self._done}" max="{self._total}"></progress> '
            f"{self._done}/{self._total} {escape(self._status)} ({seconds:.0f} s)"
        )

    def __repr__(self) -> str:
        return f"{self._title}: {self._done}/{self._total} {self._status}"


class RoundProgress:
    """Shows the rounds of one run as they finish.

    Args:
        title: what is running; what follows a comma holds at its begin, such as the time left, and is not
            repeated later.
        num_server_rounds: how many rounds it has.
        alone: nothing else shows its progress here; else there is no bar, even on a terminal.
    """

    def __init__(self, title: str, num_server_rounds: int, *, alone: bool = True) -> None:
        self._begins, self._title, self._total = title, title.partition(",")[0], num_server_rounds
        self._console = _console()
        self._lines = not (alone and (self._console.is_terminal or self._console.is_jupyter))
        self._bar = (
            NotebookBar()
            if self._console.is_jupyter and alone
            else Progress(
                TextColumn("{task.description:24}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                disable=self._lines,
            )
        )
        self._task = self._bar.add_task(title, total=num_server_rounds, status="starting")

    def __enter__(self) -> RoundProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._title != self._begins:
            self._bar.update(self._task, description=self._title)
        self._bar.stop()

    def show(self, lines: Sequence[tuple[str, str]]) -> None:
        """Say what is about to be done: a heading and a sentence in each line."""
        text = "\n".join(f"{heading:10}{text}" for heading, text in lines)  # one output of a notebook's cell
        self._console.print(text)

    def begin(self, finished: int, left_out: Mapping[int, str] | None = None) -> None:
        """Clients are about to be asked.

        Args:
            finished: rounds that were done before.
            left_out: partitions that take no part, and why.
        """
        for partition, why in (left_out or {}).items():
            self._console.print(f"{self._title}: partition {partition} is left out, {why}")
        self._bar.update(self._task, completed=finished, status="training")
        if self._lines and finished < self._total:
            self._console.print(f"{self._begins}: rounds {finished + 1} to {self._total}")

    def update(self, record: dict[str, Any]) -> None:
        """A round is done; ``record`` is its line in ``rounds.jsonl``. Round 0 is before training."""
        shown = [f"{key} {record[key]:.{d}f}" for key, d in SHOWN if record.get(key) is not None]
        gap = [] if record.get("gap") is None else [f"gap {record['gap']:.2g}"]
        self._bar.update(self._task, completed=record["round"], status=", ".join([*shown, *gap]))
        for partition, why in list(record["refused"].items())[:REASONS]:
            line = f"{self._title}: round {record['round']}, partition {partition} is refused: {why}"
            self._console.print(line)
        if self._lines:
            lost = f", {len(record['refused'])} refused" if record["refused"] else ""
            number = f"round {record['round']}/{self._total}" if record["round"] else "before training"
            number += f", as {record['taken_from']} measured it:" if "taken_from" in record else ""
            done = f"{self._title}: {number} {', '.join(shown)}{lost}"
            self._console.print(f"{done}, {record['seconds']:.1f} s{_diagnosis(record)}")


def _diagnosis(record: dict[str, Any]) -> str:
    """Diagnostics of the aggregation, see `strategies.diagnostics`; nothing where it was not measured."""
    if record.get("gap") is None:
        return ""
    cosine = f", cosine {record['cosine']:.2f}" if "cosine" in record else ""
    lost = f", sketch lost {100 * record['sketch_lost']:.2g} %" if record.get("sketch_lost") else ""
    return (
        f" | gap {record['gap']:.2g}{cosine}, effective rank "
        f"{record['effective_rank']:.1f}, energy lost {100 * record['energy_lost']:.2g} %{lost}"
    )
