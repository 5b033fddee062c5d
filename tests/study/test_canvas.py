"""Axes that can be read."""

from __future__ import annotations

import pytest
from matplotlib import rc_context

from fedlora.study.report.figure import SETTINGS, Canvas
from fedlora.study.report.format import significant


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.27, 0.4), (0.3, 0.31), (1e-7, 0.3), (4.0, 90.0)],
    ids=["narrow", "hair", "wide", "decade"],
)
def test_a_logarithmic_axis_has_two_labels_or_more(low: float, high: float) -> None:
    with rc_context(SETTINGS):
        canvas = Canvas()
        canvas.axes.plot([1, 2], [low, high])
        canvas.log_axis("y", significant)
        bottom, top = canvas.axes.get_ylim()
        shown = [tick for tick in canvas.axes.get_yticks() if bottom <= tick <= top]
    assert len(shown) >= 2
    assert len({significant(tick) for tick in shown}) == len(shown)


def test_no_accuracy_over_100_percent_is_written_at_an_axis() -> None:
    with rc_context(SETTINGS):
        canvas = Canvas()
        canvas.axes.plot([1.0, 1.0], [1, 2])
        canvas.percent_axis("x")
        canvas.figure.draw_without_rendering()
        written = [text.get_text() for text in canvas.axes.get_xticklabels()]
    assert "100%" in written
    assert not [text for text in written if text and float(text.rstrip("%")) > 100]
