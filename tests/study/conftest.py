"""Fixtures for the tests of studies."""

from __future__ import annotations

import pytest

from fedlora.study.execute import cell
from tests.study.simulation import Simulation


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """Studies run on it instead of an engine."""
    simulation = Simulation()
    monkeypatch.setattr(cell, "start", simulation.start)
    monkeypatch.setattr(cell, "simulate_on", simulation.simulate_on)
    monkeypatch.setattr(cell.Engine, "inputs", lambda engine, config, home: simulation.inputs(config))
    return simulation
