"""What a client has spent is reported whether or not what it sent can be used: it was sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.privacy.ledger import read_ledgers
from fedlora.server.preview import preview
from fedlora.simulation.simulate import simulate
from tests.conftest import tiny_config

FAR: dict[str, Any] = {
    "privacy.mode": "example", "privacy.noise-multiplier": 1.0, "privacy.target-epsilon": 90.0,
    "min-train-nodes": 1, "client-groups": '[{"partitions": "0", "local-steps": 12}]',
}  # fmt: skip


def test_a_refused_update_is_in_the_reported_epsilon(cache: Path, tmp_path: Path) -> None:
    result = simulate(tiny_config(**{**FAR, "strategy.max-update-norm": 0.2}), tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert any("0" in record["refused"] for record in records)
    (ledgers,) = {path.parent for path in tmp_path.rglob("datasets.jsonl")}
    spent = {a.identity.rpartition("-")[2]: a.standing.epsilon for a in read_ledgers(ledgers)}
    assert result["epsilon_by_client"] == pytest.approx(spent, abs=0.011)  # told rounded up to 0.01
    assert all(told >= spent[client] for client, told in result["epsilon_by_client"].items())
    assert result["claim"]["client"] == int(max(spent, key=spent.__getitem__))


def test_at_client_level_a_given_noise_is_announced_with_the_epsilon_that_it_has(
    cache: Path, tmp_path: Path
) -> None:
    config = tiny_config(**{"privacy.mode": "client", "privacy.noise-multiplier": 0.3})
    (said,) = [text for name, text in preview(config).lines() if name == "privacy"]
    spent = simulate(config, tmp_path / "run")["epsilon"]
    assert said.startswith(f"client level, epsilon {spent:.3g} at delta 1e-05 after 3 rounds")
    target = tiny_config(**{"privacy.mode": "client", "privacy.target-epsilon": 5.0})
    (said,) = [text for name, text in preview(target).lines() if name == "privacy"]
    assert said == "client level, epsilon 5 at delta 1e-05"
