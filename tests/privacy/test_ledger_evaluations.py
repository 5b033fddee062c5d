"""Evaluations on a ledger: what they add, and one limit for them and the training together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import BudgetExceeded, LedgerRefused
from fedlora.privacy.chain import Chain
from fedlora.privacy.entries import evaluate_entry
from fedlora.privacy.ledger import Ledger, read_ledgers
from fedlora.privacy.spending import EvaluationRelease
from fedlora.privacy.types import NeighboringRelation
from tests.privacy.ledgers import BUDGET, DATASET, release


def evaluation(epsilon: float = 0.5, run_key: str = "run", **changes: Any) -> EvaluationRelease:
    given = {"server_round": 1, "partition_id": 0, "neighboring_relation": "zero_out_one", **changes}
    given["neighboring_relation"] = NeighboringRelation(given["neighboring_relation"])
    return EvaluationRelease(run_key=run_key, epsilon=epsilon, **given)


def test_evaluations_add_their_epsilon_and_no_delta(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", DATASET)
    training = ledger.reserve(release(), BUDGET)
    own = ledger.reserve_evaluation(evaluation(), set_aside=2.0)
    ledger.reserve_evaluation(evaluation(0.25, "other"), set_aside=2.0)
    assert (own.epsilon, own.on_evaluations) == (training.epsilon + 0.5, 0.5)
    assert own.delta == training.delta == BUDGET.target_delta
    (again,) = read_ledgers(tmp_path / "ledger")
    assert again.standing.epsilon == training.epsilon + 0.75
    assert again.standing.on_evaluations == 0.75


def test_training_and_evaluations_keep_one_limit_whatever_is_set_aside_later(tmp_path: Path) -> None:
    """A share that grows or shrinks between them never lets both together beyond the owner's limit."""
    for first, then in ((1.0, 4.0), (4.0, 1.0), (0.0, 8.0), (8.0, 0.0)):
        ledger = Ledger(tmp_path / f"{first}-{then}", DATASET)
        for share in (first, then, first):
            for number in range(1, 200):
                try:
                    ledger.reserve(release(number, steps=40), BUDGET, max_epsilon=8.0, set_aside=share)
                except BudgetExceeded:
                    break
            for _ in range(20):
                try:
                    ledger.reserve_evaluation(evaluation(), max_epsilon=8.0, set_aside=share)
                except BudgetExceeded:
                    break
            assert ledger.standing().epsilon <= 8.0 + 1e-6
        assert ledger.standing().epsilon > 4.0


@pytest.mark.parametrize("changed", [{"epsilon": 0.0}, {"epsilon": "1"}, {"neighboring_relation": "friends"}])
def test_an_evaluation_that_is_none_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", DATASET)
    ledger.reserve(release(), BUDGET)
    chain = Chain(ledger.path)
    with chain.locked():
        chain.append({**evaluate_entry(evaluation()), **changed})
    with pytest.raises(LedgerRefused, match="line 3 is not one"):
        read_ledgers(tmp_path / "ledger")
