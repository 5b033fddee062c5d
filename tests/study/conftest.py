"""Fixtures for the tests of studies."""

from __future__ import annotations

import pytest

from fedlora.study.execute import cell
from tests.study.simulation import Simulation


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """Studies run on it instead of an engine; their reports have the overview and no other chart.

    Drawing them takes ten times as long as all else; `tests.study.test_report` and `test_charts` draw them.
    """
    simulation = Simulation()
    monkeypatch.setattr(cell, "start", simulation.start)
    monkeypatch.setattr(cell, "simulate_on", simulation.simulate_on)
    monkeypatch.setattr(cell.Engine, "inputs", lambda engine, config, home: simulation.inputs(config))
    monkeypatch.setattr(cell.Engine, "gives", lambda engine, *cell: simulation.gives(*cell))
    monkeypatch.setattr("fedlora.study.report.report.draw_charts", lambda rows: [])
    return simulation
