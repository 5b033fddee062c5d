"""RoLoRA: factors in turn, exact in both, each with a server momentum of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.factors import Tensors
from fedlora.core.state import ClientSpec, ModuleSpec, State
from strategies.registry import make_rule
from strategies.rule import Rule
from strategies.server_optimizer import ServerOptimizer
from tests import oracles
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    effective,
    federations,
    numpy,
    oracle_layer,
    relative,
)

RULE = make_rule("rolora")
TURNS = ("B", "A", "B", "A", "B")


def factor(state: State, letter: str) -> Tensors:
    return {name: getattr(f, letter) for name, f in state.adapters.items()}


def other(letter: str) -> str:
    return "A" if letter == "B" else "B"


def played(rule: Rule, federation: Federation, rounds: int) -> list[State]:
    states = [federation.start(rule)]
    for _ in range(rounds):
        states.append(rule.aggregate(states[-1], federation.updates(rule, states[-1]))[0])
    return states


@given(federation=federations(min_clients=2))
def test_one_factor_moves_and_the_other_keeps_its_bits_beginning_with_b(federation: Federation) -> None:
    states = played(RULE, federation.suited(RULE.facts), len(TURNS))
    for trained, before, after in zip(TURNS, states, states[1:], strict=False):
        assert RULE.broadcast(before, federation.clients[0]).trained == {trained}
        assert_same_bits(factor(after, other(trained)), factor(before, other(trained)))
        moved = set().union(*(RULE.broadcast(before, c).modules for c in federation.clients))
        for name, tensor in factor(after, trained).items():
            assert name not in moved or not torch.equal(tensor, factor(before, trained)[name])


@given(federation=federations(min_clients=2), rounds=st.integers(0, 3))
def test_the_mean_of_products_is_kept_at_both_parities(federation: Federation, rounds: int) -> None:
    federation = federation.suited(RULE.facts)
    before = played(RULE, federation, rounds)[-1]
    updates = federation.updates(RULE, before)
    after, diagnostics = RULE.aggregate(before, updates)
    assert diagnostics is not None
    assert diagnostics.gap < 1e-6
    for name, delta in effective(after).items():
        _, clients = oracle_layer(before, updates, name)
        assert relative(delta, oracles.mean_update(clients)) < 1e-12


@given(federation=federations(min_clients=2))
def test_in_odd_rounds_it_is_ffa_lora(federation: Federation) -> None:
    federation = federation.suited(RULE.facts)
    before = federation.start(RULE)
    updates = federation.updates(RULE, before)
    mine, _ = RULE.aggregate(before, updates)
    theirs, _ = make_rule("ffa").aggregate(before, updates)
    for letter in "AB":
        assert_same_bits(factor(mine, letter), factor(theirs, letter))


def _mean(start: oracles.Adapter, clients: list[oracles.Client], letter: str) -> oracles.Array:
    """``sum_k p_k A_k``, or ``sum_k p_k (s_k / s) B_k``."""
    terms = [k.p * (k.A if letter == "A" else k.s / start.s * k.B) for k in clients]
    return np.sum(terms, axis=0)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
@given(federation=federations(min_clients=2))
def test_a_factor_that_rests_keeps_its_place_and_its_momentum(name: str, federation: Federation) -> None:
    """As if each factor had a server of its own, which only saw its own rounds."""
    optimizer = ServerOptimizer(name=name, learning_rate=0.5)
    rule = make_rule("rolora", optimizer=optimizer)
    federation = federation.suited(rule.facts)
    state = federation.start(rule)
    alone: dict[str, tuple[Tensors, dict[str, Tensors]]] = {x: (factor(state, x), {}) for x in "AB"}
    for trained in TURNS:
        updates = federation.updates(rule, state)
        after, _ = rule.aggregate(state, updates)
        tensors, memories = alone[trained]
        for module in tensors:
            start, clients = oracle_layer(state, updates, module)
            center = torch.from_numpy(_mean(start, clients, trained))
            kept = memories.get(module, {})
            tensors[module], memories[module] = optimizer.step(trained, tensors[module], center, kept)
        for module, tensor in tensors.items():
            assert relative(numpy(factor(after, trained)[module]), numpy(tensor)) < 1e-9
        resting = {k: t for k, t in state.memory.items() if k.endswith(f"/{other(trained)}")}
        assert_same_bits({k: after.memory[k] for k in resting}, resting)
        state = after


def test_from_b_of_zero_the_first_round_moves_the_product() -> None:
    """With A first there would be nothing to aggregate: B A stays zero whatever A becomes."""
    federation = Federation(
        modules={"layer": ModuleSpec(out_features=4, in_features=5)},
        rank=2,
        scaling=1.0,
        clients=tuple(ClientSpec(partition_id=i, rank=2, scaling=1.0) for i in range(2)),
        weights=(1.0, 1.0),
        seed=1,
        dtype=torch.float32,
    )
    start = RULE.init(replace(federation.template(), adapters=None), seed=0)
    assert not start.adapters["layer"].B.any()
    after, _ = RULE.aggregate(start, federation.updates(RULE, start))
    assert float(np.linalg.norm(effective(after)["layer"])) > 0.1
