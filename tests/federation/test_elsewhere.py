"""An adapter of a model that was named by a relative path is used from another working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.models import AdapterCard
from fedlora.models.export import load_adapter
from fedlora.simulation.simulate import simulate
from tests.conftest import tiny_config
from tests.models.families import save


def test_the_base_is_found_from_anywhere(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "model", "bert", "SequenceClassification")
    monkeypatch.chdir(tmp_path)
    few = {"num-server-rounds": 1, "train.local-steps": 1, "data.max-length": 32}
    simulate(tiny_config(**{"model.name": "model", **few}), tmp_path / "run")
    monkeypatch.chdir("/")
    card = AdapterCard.read(tmp_path / "run" / "adapter")
    assert card.model.name == str(tmp_path / "model")
    load_adapter(tmp_path / "run" / "adapter")
