"""What a run leaves beside its figures: a model card with its facts, and what its model writes meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.validate import check
from tests.conftest import tiny_config
from tests.federation.test_kinds import run

LM = {"model.name": "tiny-lm", "task": "causal-lm", "data.max-length": 32, "train.local-steps": 1}


def rows(path: Path) -> dict[str, str]:
    """The table of the card in a run's adapter."""
    lines = (path / "run" / "adapter" / "README.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "---" not in line]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_the_card_says_who_trained_on_what_at_which_price(tmp_path: Path, cache: Path) -> None:
    private = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0, "license": "apache-2.0"}
    run(tmp_path / "a", **private)
    run(tmp_path / "b", partitions="0-2", **{"num-server-rounds": 2})
    first, second = rows(tmp_path / "a"), rows(tmp_path / "b")
    result = json.loads((tmp_path / "a" / "run" / "result.json").read_text())
    assert first["epsilon"].startswith(f"{result['epsilon']:.4g} at delta 1e-05")
    assert (first["rounds"], first["clients"]) == ("3", "4")
    assert (second["rounds"], second["clients"]) == ("2", "3")
    assert "epsilon" not in second
    assert first["base, hash"] == second["base, hash"]
    assert first["data, hash"] == second["data, hash"]
    run(tmp_path / "c", **{"data.partitioner": "iid", "data.num-partitions": 3, "num-server-rounds": 1})
    assert rows(tmp_path / "c")["data, hash"] != first["data, hash"]
    front = (tmp_path / "a" / "run" / "adapter" / "README.md").read_text().split("---")[1]
    assert "license: apache-2.0" in front
    assert "license" not in (tmp_path / "b" / "run" / "adapter" / "README.md").read_text()


def test_a_model_writes_every_so_many_rounds(tmp_path: Path, cache: Path) -> None:
    run(tmp_path, **LM, **{"generate-every": 2, "num-server-rounds": 3})
    found = json.loads((tmp_path / "run" / "samples.json").read_text())
    kinds = [key for key, value in found.items() if isinstance(value, list)]
    assert kinds == ["before", "round 2", "after"]
    assert [one["prompt"] for one in found["round 2"]] == [one["prompt"] for one in found["before"]]


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(
        NotApplicable, match=r"^generate-every = 1: classification writes no text, must be 0$"
    ):
        check(tiny_config(**{"generate-every": 1}))
    with pytest.raises(
        NotApplicable, match=r"^generate-every = 1: clients keep a part of the model, must be 0$"
    ):
        check(tiny_config(**LM, **{"generate-every": 1, "strategy.name": "local-only"}))
    with pytest.raises(ConfigError, match=r"^license = 'a\\nb': "):
        tiny_config(license="a\nb")
