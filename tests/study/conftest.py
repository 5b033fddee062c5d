"""Fixtures for the tests of studies."""

from __future__ import annotations

import pytest

from fedlora.study import running
from tests.study.simulation import Simulation


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """Studies run on it instead of an engine."""
    simulation = Simulation()
    monkeypatch.setattr(running, "start", simulation.start)
    monkeypatch.setattr(running, "simulate_on", simulation.simulate_on)
    monkeypatch.setattr(running.Engine, "inputs", lambda engine, config, home: simulation.inputs(config))
    return simulation
