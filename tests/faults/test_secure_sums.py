"""Runs with secure sums over real nodes, which sign with the keys that they have, end as plain ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults.deployed import federation, run

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(2400)]

SUMS: dict[str, Any] = {"strategy.name": "fedavg", "secure.mode": "sums", "secure.max-weight": 1000}


def difference(one: Path, other: Path) -> float:
    """The largest difference of two runs' adapters, as a share of the norm of its tensor."""
    first, second = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, other))
    return max(float((first[n] - t).norm() / t.norm()) for n, t in second.items())


def test_three_nodes_end_where_they_end_without(tmp_path: Path) -> None:
    with federation(tmp_path / "home") as up:
        sums = run(up, tmp_path / "sums", num_server_rounds=2, min_train_nodes=3, **SUMS)
        plain = run(
            up, tmp_path / "plain", num_server_rounds=2, min_train_nodes=3, **{**SUMS, "secure.mode": "none"}
        )
    assert [line["participants"] for line in sums] == [[0, 1, 2]] * 2
    losses = [[line["train_loss"] for line in lines] for lines in (sums, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert 0 < difference(tmp_path / "sums", tmp_path / "plain") < 1e-4
