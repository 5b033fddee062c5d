"""What a person sees while a run goes on: figures, what the aggregation lost, who was refused and why."""

from __future__ import annotations

import io
import sys
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from fedlora.server import progress
from fedlora.server.progress import RoundProgress


def seen(
    monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], *, terminal: bool, title: str = "flora"
) -> str:
    screen = io.StringIO()

    def made(*, stderr: bool, **options: Any) -> Console:
        assert stderr
        return Console(file=screen, force_terminal=terminal, width=160, no_color=True, **options)

    monkeypatch.setattr(progress, "Console", made)
    with RoundProgress(title, 3) as shown:
        shown.begin(0)
        shown.update(record)
    return screen.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_title_is_shown_letter_for_letter(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a[/b]:key:Rule" in seen(monkeypatch, RECORD, terminal=terminal, title="a[/b]:key:Rule")


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


def test_the_time_that_was_left_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said = seen(monkeypatch, RECORD, terminal=False, title="[2/9] flora, about 5 min left").splitlines()
    assert said[0] == "[2/9] flora, about 5 min left: rounds 1 to 3"
    assert not any("left" in line for line in said[1:])


def test_a_bar_shows_no_gap_where_none_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    said = seen(monkeypatch, RECORD | {"gap": None, "refused": {}}, terminal=True)
    assert "gap" not in said
    assert "refused" not in said


def test_a_notebook_has_a_bar_without_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is a fake; `tests.test_docs_notebooks` has real ones."""
    shown: list[Any] = []
    display = ModuleType("IPython.display")
    display.display = lambda what, display_id: shown.append(what) or Handle()  # type: ignore[attr-defined]

    class Handle:
        def update(self, what: Any) -> None:
            shown.append(what._repr_html_())

    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    made = Console(file=io.StringIO(), width=160)
    made.is_jupyter = True
    monkeypatch.setattr(progress, "Console", lambda **_: made)
    with RoundProgress("<flora>, about 9 s left", 3) as bar:
        bar.begin(0)
        bar.update(RECORD | {"refused": {}})
    assert len(shown) == 4
    assert "about 9 s left" in shown[-2]
    assert shown[-1].startswith('&lt;flora&gt; <progress value="2" max="3"></progress> 2/3 accuracy 0.750')
