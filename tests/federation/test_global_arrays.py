"""The arrays that leave a strategy are the whole global model, whatever the rule did with the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from fedlora import wire
from fedlora.core.state import ClientSpec, ClientUpdate, State
from fedlora.errors import ConfigError
from strategies.flower import FactorStrategy
from strategies.registry import RULES, make_rule
from tests import oracles
from tests.federation.fake_grid import FakeGrid, ToyClient
from tests.federation.small import MODULES, initial_arrays
from tests.strategies.federations import relative
from tests.strategies.test_exactness import asked, by_oracle

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
    return {n: scaling * (own["B"].double() @ own["A"].double()).numpy() for n, own in parts.layers.items()}


def strategy_of(name: str, **options: Any) -> FactorStrategy:
    rule = make_rule(name)
    if rule.facts.mixed_ranks and rule.facts.trained:
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
        rank = wire.from_peft(wire.from_record(result.arrays)).of("A")[layer].shape[0]
        assert rank <= max(RANK, min(MODULES[layer]))
    assert strategy.state is not None
    assert np.array_equal(result.arrays[HEAD].numpy(), strategy.state.head["classifier.weight"].numpy())


MOVING = [name for name, rule in RULES.items() if rule.facts.updates_base]


@pytest.mark.parametrize("name", MOVING)
def test_a_run_goes_on_from_the_arrays_of_another_at_the_clients_rank(name: str, tmp_path: Path) -> None:
    """The second run starts from the first one's global model, and its round adds to that."""
    grid = FakeGrid(range(CLIENTS), ToyClient(tmp_path))
    arrays = strategy_of(name).start(grid, initial_arrays(RANK), num_rounds=2).arrays
    if len({a.shape[0] for n, a in arrays.items() if "lora_A" in n}) > 1:
        with pytest.raises(ConfigError, match=r"initial_arrays has ranks .* need rank="):
            strategy_of(name).start(grid, arrays)
    resumed = strategy_of(name, rank=RANK)
    before, again = dense(arrays), dense(resumed.start(grid, arrays, num_rounds=0).arrays)
    assert all(relative(again[layer], delta) < 1e-5 for layer, delta in before.items())
    assert resumed.state is not None
    assert {f.rank for f in resumed.state.adapters.values()} == {RANK}
    if resumed.rule.facts.exact:
        wanted: dict[str, oracles.Array] = {}
        aggregate = resumed.rule.aggregate

        def recorded(state: State, updates: list[ClientUpdate], **options: Any) -> Any:
            wanted.update({layer: before[layer] + asked(state, updates, layer) for layer in before})
            return aggregate(state, updates, **options)

        object.__setattr__(resumed.rule, "aggregate", recorded)
        after = dense(resumed.start(grid, arrays, num_rounds=1).arrays)
        assert all(relative(after[layer], delta) < 1e-5 for layer, delta in wanted.items())


def test_a_rule_that_keeps_the_base_refuses_what_it_would_lose(tmp_path: Path) -> None:
    grid = FakeGrid(range(CLIENTS), ToyClient(tmp_path))
    arrays = strategy_of("flora").start(grid, initial_arrays(RANK), num_rounds=2).arrays
    with pytest.raises(ConfigError, match=r"encoder\.q has rank 8, fedavg would lose what is over rank = 3"):
        strategy_of("fedavg", rank=3).start(grid, arrays)
    padded = dense(strategy_of("fedavg", rank=8).start(grid, arrays, num_rounds=0).arrays)
    assert all(relative(padded[layer], delta) < 1e-5 for layer, delta in dense(arrays).items())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "base_model.model.encoder.q.lora_magnitude_vector",
            torch.ones(12),
            r"vector: only lora_A",
        ),
        ("base_model.model.e.lora_embedding_A", torch.ones(3, 9), r"e\.lora_embedding_A: only lora_A"),
        ("base_model.model.q.lora_A.default.weight", torch.ones(3, 9), r"get_peft_model_state_dict"),
        ("encoder.q.lora_A.weight", torch.ones(3, 8), r"names begin with base_model\.model\."),
        ("base_model.model.c.lora_A.weight", torch.ones(3, 9, 1, 1), r"no pairs of lora_A and lora_B"),
        ("base_model.model.encoder.q.lora_A.weight", torch.ones(3, 8, 1, 1), r"encoder\.q: .*only linear"),
        (
            "base_model.model.classifier.weight",
            torch.full((2, 6), torch.nan),
            r"weight holds a NaN",
        ),
    ],
)
def test_initial_arrays_that_are_no_plain_adapter_are_refused_by_name(
    key: str, value: torch.Tensor, message: str, tmp_path: Path
) -> None:
    arrays = {**initial_arrays().to_torch_state_dict(), key: value}
    with pytest.raises(ConfigError, match=message):
        strategy_of("flora").start(FakeGrid([0], ToyClient(tmp_path)), ArrayRecord(arrays))


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scaling_that_is_none_is_refused(scaling: float, tmp_path: Path) -> None:
    strategy = FactorStrategy(make_rule("flora"), scaling=scaling)
    with pytest.raises(ConfigError, match=r"scaling = .*: must be alpha / r"):
        strategy.start(FakeGrid([0], ToyClient(tmp_path)), initial_arrays())


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.facts.updates_base])
def test_one_scaling_for_all_cancels_out_where_no_base_moves(name: str, tmp_path: Path) -> None:
    """Which is why these rules do not need it right from a client that uses no mod."""
    given = [
        FactorStrategy(make_rule(name), scaling=scaling).start(
            FakeGrid(range(CLIENTS), ToyClient(tmp_path / str(scaling))), initial_arrays(RANK), num_rounds=2
        )
        for scaling in (1.0, 2.0)
    ]
    one, two = (dense(result.arrays, 1.0) for result in given)
    assert all(relative(one[layer], two[layer]) < 1e-5 for layer in one)
