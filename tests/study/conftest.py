"""Fixtures for the tests of studies."""

from __future__ import annotations

import pytest

from fedlora.study import runner
from tests.study.simulation import Simulation


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """Studies run on it instead of an engine."""
    simulation = Simulation()
    monkeypatch.setattr(runner, "start", simulation.start)
    monkeypatch.setattr(runner, "simulate_on", simulation.simulate_on)
    return simulation
