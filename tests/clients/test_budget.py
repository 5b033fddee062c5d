"""A client's own account: charged before training, once for each release, never over the budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clients.budget import Spending, noise_of, train_within_budget
from clients.holdings import Holdings
from clients.resident import resident
from fedlora.errors import BudgetExceeded
from fedlora.initial import fresh_adapters
from fedlora.privacy.calibration import epsilon_spent
from tests.conftest import tiny_config

PRIVATE = {"privacy.mode": "example", "privacy.target-epsilon": 3.0, "privacy.accountant": "rdp"}


def test_a_release_is_charged_once_and_survives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "spent" / "0.jsonl"
    Spending(path).reserve("round-1", 5)
    Spending(path).reserve("round-1", 5)
    Spending(path).reserve("round-2", 5)
    assert Spending(path).steps(including="round-2", steps=5) == 10
    assert Spending(path).steps(including="round-3", steps=7) == 17


def test_noise_is_for_the_most_rounds_that_the_server_allows() -> None:
    few = tiny_config(**PRIVATE, **{"num-server-rounds": 40, "privacy.max-participations": 4})
    many = tiny_config(**PRIVATE, **{"num-server-rounds": 40})
    low, high = noise_of(few, 0.05, 3), noise_of(many, 0.05, 3)
    assert low < high
    assert epsilon_spent(low, 0.05, 12, 1e-5, "rdp") == pytest.approx(3.0, rel=0.01)
    assert epsilon_spent(high, 0.05, 120, 1e-5, "rdp") == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("seed", [1, None], ids=["seeded", "system"])
def test_a_client_declines_before_it_would_overspend(seed: int | None, tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**PRIVATE)
    worker, holdings = resident(config), Holdings(tmp_path)
    adapters = fresh_adapters(worker.model.modules, 4, 2.0, 0)

    def once(server_round: int) -> float:
        worker.model.load(adapters, {}, trains=frozenset("AB"), train_head=True)
        _, spent = train_within_budget(
            worker, config, holdings, partition_id=0, server_round=server_round, local_steps=3, seed=seed
        )
        return spent.epsilon

    spent = [once(1), once(2), once(3)]
    assert spent == sorted(spent)
    assert 2.9 < spent[-1] <= 3.0
    with pytest.raises(BudgetExceeded, match=r"target-epsilon = 3.0: 12 steps would spend"):
        once(4)
    file = tmp_path / "spent" / "0.jsonl"
    assert len(file.read_text().splitlines()) == 3
    if seed is None:
        with pytest.raises(BudgetExceeded):
            once(3)
    else:
        assert once(3) == spent[-1]
    assert np.isfinite(spent).all()
