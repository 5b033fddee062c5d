"""The arrays that leave a strategy are the whole global model, whatever the rule did with the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord

from fedlora import wire
from fedlora.updates import ClientSpec, ClientUpdate, State
from strategies.flower import FactorStrategy
from strategies.registry import RULES, make_rule
from tests import oracles
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import MODULES, initial_arrays
from tests.strategies.federations import relative
from tests.strategies.test_exactness import by_oracle

RANK, SCALING, CLIENTS, ROUNDS = 3, 2.0, 3, 3
HEAD = "base_model.model.classifier.weight"


class DenseServer:
    """Each layer's (out, in) change of the weight, by the rule's oracle, beside a strategy that runs."""

    def __init__(self, strategy: FactorStrategy) -> None:
        self.rule = strategy.rule
        self.moved: dict[str, oracles.Array] = {}
        self.total: dict[str, oracles.Array] = {}
        self._aggregate = self.rule.aggregate
        object.__setattr__(self.rule, "aggregate", self.aggregate)

    def aggregate(self, state: State, updates: list[ClientUpdate], **options: Any) -> Any:
        chosen = list(self.rule.choose(sorted(updates, key=lambda u: u.partition_id)))
        for name in state.adapters:
            _, _, outcome = by_oracle(self.rule, state, chosen, name)
            self.moved[name] = self.moved.get(name, 0.0) + outcome.into_base
            self.total[name] = self.moved[name] + outcome.adapter.delta()
        return self._aggregate(state, updates, **options)


def dense(arrays: ArrayRecord, scaling: float = SCALING) -> dict[str, oracles.Array]:
    """What PEFT computes with these arrays at that scaling, and nothing else that is known of the run."""
    parts = wire.from_peft(wire.from_record(arrays))
    return {n: scaling * (parts.B[n].double() @ A.double()).numpy() for n, A in parts.A.items()}


def strategy_of(name: str, **options: Any) -> FactorStrategy:
    rule = make_rule(name)
    if rule.facts.mixed_ranks and rule.facts.trains:
        options["client_spec"] = lambda p: ClientSpec(
            partition_id=p, rank=(3, 1, 2)[p], scaling=(2.0, 6.0, 3.0)[p]
        )
    return FactorStrategy(rule, scaling=SCALING, **options)


@pytest.mark.parametrize("name", RULES)
def test_result_and_evaluate_fn_get_the_dense_computation(name: str, tmp_path: Path) -> None:
    strategy = strategy_of(name)
    server = DenseServer(strategy)
    seen: list[ArrayRecord] = []

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> None:
        if not server_round:
            return
        seen.append(arrays)
        assert all(relative(delta, server.total[n]) < 1e-5 for n, delta in dense(arrays).items())

    result = strategy.start(
        FakeGrid(range(CLIENTS), ToyClient(tmp_path)), initial_arrays(RANK), num_rounds=ROUNDS,
        evaluate_fn=evaluate_fn,
    )  # fmt: skip
    assert len(seen) == ROUNDS
    given = dense(result.arrays)
    assert set(given) == set(MODULES)
    for layer, delta in given.items():
        assert relative(delta, server.total[layer]) < 1e-5, layer
        rank = wire.from_peft(wire.from_record(result.arrays)).A[layer].shape[0]
        assert rank <= max(RANK, min(MODULES[layer]))
    assert strategy.state is not None
    assert np.array_equal(result.arrays[HEAD].numpy(), strategy.state.head["classifier.weight"].numpy())
