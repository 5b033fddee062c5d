"""What a person sees while a run goes on: figures, what the aggregation lost, who was refused and why."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fedlora.server import progress
from fedlora.server.progress import RoundProgress


def seen(monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], *, terminal: bool) -> str:
    screen = io.StringIO()
    made = Console(file=screen, force_terminal=terminal, width=160, soft_wrap=True, no_color=True)
    monkeypatch.setattr(progress, "Console", lambda **_: made)
    with RoundProgress("flora", 3) as shown:
        shown.begin(0)
        shown.update(record)
    return screen.getvalue()


RECORD: dict[str, Any] = {
    "round": 2, "accuracy": 0.75, "gap": 0.125, "cosine": 0.5, "effective_rank": 3.0, "energy_lost": 0.1,
    "refused": {"4": "its update is not finite", "5": "late", "6": "late", "7": "late"}, "seconds": 1.5,
}  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_refusals_are_told_with_their_reasons(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said = seen(monkeypatch, RECORD, terminal=terminal)
    assert "round 2, partition 4 is refused: its update is not finite" in said
    assert "partition 7" not in said
    assert "accuracy 0.750" in said
    assert "gap 0.12" in said


def test_a_bar_shows_no_gap_where_none_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    said = seen(monkeypatch, RECORD | {"gap": None, "refused": {}}, terminal=True)
    assert "gap" not in said
    assert "refused" not in said
