"""Runs with secure sums over real nodes: the end of plain ones, and nodes killed between any two phases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from scipy.optimize import brentq

from clients.journal import MASKED, read_journal
from fedlora.errors import RunFailed
from fedlora.privacy.ledger import read_ledgers
from tests.faults.deployed import Up, federation, misbehaving, run, wait_for_nodes
from tests.secure.test_shared_noise import gaussian

pytestmark = [pytest.mark.deployed, pytest.mark.timeout(2400)]

NODES = 7
THREE: dict[str, Any] = {"partitions": "0-2", "min-train-nodes": 3, "min-available-nodes": 3}
SUMS: dict[str, Any] = {
    "data.num-partitions": NODES, "strategy.name": "fedavg", "secure.mode": "sums", "secure.min-clients": 2,
    "secure.threshold": 0.51, "secure.max-weight": 1000, "max-missed-rounds": 1,
}  # fmt: skip
NOISY: dict[str, Any] = {
    "privacy.mode": "client", "secure.noise": "distributed", "secure.min-clients": 3, "secure.colluding": 1,
    "privacy.noise-multiplier": 4.0, "privacy.clipping-norm": 0.1, "privacy.target-epsilon": 8.0,
    "privacy.accountant": "pld", "privacy.dataset-id": "shared",
}  # fmt: skip
PLAN = {
    0: {1: "die at advertise"}, 1: {1: "die at share"}, 2: {1: "die at train"}, 3: {2: "die at confirm"},
    4: {3: "die at unmask"}, 5: {4: "die at unmask"},
}  # fmt: skip


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Seven nodes, so that each dies once and none is waited for, which sign with the keys that they have."""
    home = tmp_path_factory.mktemp("secure")
    with federation(home, nodes=NODES, sabotage=True) as found:
        yield found


def difference(one: Path, other: Path) -> float:
    """The largest difference of two runs' adapters, as a share of the norm of its tensor."""
    first, second = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (one, other))
    return max(float((first[n] - t).norm() / t.norm()) for n, t in second.items())


def test_three_nodes_end_where_they_end_without(up: Up, tmp_path: Path) -> None:
    sums = run(up, tmp_path / "sums", num_server_rounds=2, **{**SUMS, **THREE})
    plain = run(up, tmp_path / "plain", num_server_rounds=2, **{**SUMS, **THREE, "secure.mode": "none"})
    assert [line["participants"] for line in sums] == [[0, 1, 2]] * 2
    assert [line["train_loss"] for line in sums] == pytest.approx(
        [line["train_loss"] for line in plain], 1e-3
    )
    assert 0 < difference(tmp_path / "sums", tmp_path / "plain") < 1e-4


def test_nodes_share_noise_and_the_epsilon_is_in_every_ledger(up: Up, tmp_path: Path) -> None:
    """To the end, with both epsilons in the result; each node's owner reads every step in the log."""
    lines = run(up, tmp_path / "run", num_server_rounds=2, **{**SUMS, **THREE, **NOISY})
    assert [line["participants"] for line in lines] == [[0, 1, 2]] * 2
    assert all(line["train_loss"] is None for line in lines)
    claim = json.loads((tmp_path / "run" / "result.json").read_text())["claim"]
    exact = brentq(lambda e: gaussian(4.0 / 2**0.5, e) - 1e-5, 1e-3, 50)
    assert exact <= claim["epsilon"] <= 1.05 * exact
    assert 0 < claim["epsilon_of_model"] < claim["epsilon"]
    for partition in range(3):
        (account,) = read_ledgers(up.state(partition) / "ledger")
        assert (account.unit, account.standing.releases) == (":client", 2)
        assert account.standing.epsilon == pytest.approx(claim["epsilon"])
        journal = read_journal(up.state(partition))
        own = [(e.round, e.asked, e.status) for e in journal if e.run == journal[-1].run]
        steps = ["secure advertise", "secure share", MASKED, "secure confirm", "secure unmask"]
        wanted = [(number, step, "ok") for number in (1, 2) for step in steps]
        assert [entry for entry in own if entry[1] in steps] == wanted


def test_a_round_goes_on_without_a_node_killed_before_any_phase_and_the_run_is_resumed(
    up: Up, tmp_path: Path
) -> None:
    """Six die, one before each phase: the fifth has signed, and of the last two both are needed."""
    with misbehaving(up, PLAN):
        up.left_alone.set()
        told: list[dict[str, Any]] = []
        with pytest.raises(RunFailed) as caught:
            run(up, tmp_path / "run", told.append, num_server_rounds=4, **SUMS)
    assert str(caught.value).startswith("secure sums: 1 shares of partition 5's secret are left, 2 needed")
    assert "\n" not in str(caught.value)
    assert [line["participants"] for line in told] == [[3, 4, 5, 6], [3, 4, 5, 6], [4, 5, 6]]
    reasons = [told[0]["refused"][str(partition)] for partition in range(3)]
    assert reasons[0].startswith("secure sums, advertise: ")
    assert reasons[1].startswith("secure sums, share: ")
    assert not (tmp_path / "run" / "adapter").exists()
    up.left_alone.clear()
    wait_for_nodes(up)
    records = run(up, tmp_path / "run", resume=True, num_server_rounds=4, **SUMS)
    assert records[-1]["participants"] == list(range(NODES))
    assert (tmp_path / "run" / "adapter").exists()
