"""What holds for every listed rule, whatever it computes; `test_exactness` says what it computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientUpdate, State
from strategies.rule import Rule
from tests.strategies.federations import (
    DEFAULTS,
    Federation,
    assert_same_bits,
    effective,
    federations,
    named_tensors,
    numpy,
    relative,
)

every_rule = pytest.mark.parametrize("rule", DEFAULTS.values(), ids=list(DEFAULTS))
tolerance = 1e-6
"""Relative, in float64: LoRA-FAIR's minimiser stops at about 1e-8, the others at 1e-15."""


def played(rule: Rule, federation: Federation) -> tuple[State, list[ClientUpdate], State]:
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    return before, updates, rule.aggregate(before, updates)[0]


def assert_same_model(given: State, expected: State) -> None:
    """Equal effective weights and heads, up to rounding."""
    dense = effective(expected)
    for name, delta in effective(given).items():
        assert relative(delta, dense[name]) < tolerance, name
    for name, tensor in given.head.items():
        assert relative(numpy(tensor), numpy(expected.head[name])) < tolerance, name


@every_rule
@given(federation=federations(min_clients=2), order=st.permutations(range(5)))
def test_the_order_of_replies_changes_no_bit(rule: Rule, federation: Federation, order: list[int]) -> None:
    federation = federation.suited(rule.facts)
    before, updates, after = played(rule, federation)
    shuffled = [updates[i] for i in order if i < len(updates)]
    again, diagnostics = rule.aggregate(before, (u for u in reversed(shuffled)))
    assert_same_bits(named_tensors(again), named_tensors(after))
    assert diagnostics == rule.aggregate(before, updates)[1]


@every_rule
@given(federation=federations(), factor=st.floats(1e-3, 1e6))
def test_only_the_ratio_of_weights_counts(rule: Rule, federation: Federation, factor: float) -> None:
    federation = federation.suited(rule.facts)
    before, updates, after = played(rule, federation)
    rescaled = [replace(u, weight=u.weight * factor) for u in updates]
    assert_same_model(rule.aggregate(before, rescaled)[0], after)


@every_rule
@given(federation=federations())
def test_weights_matter(rule: Rule, federation: Federation) -> None:
    """Two clients at 1:3 and at 3:1 give different models: the law above is not met by ignoring weights.

    Where the rule declares weights of its own, only the head does.
    """
    federation = federation.suited(rule.facts)
    one = federation.clients[0]
    two = replace(federation, clients=(one, replace(one, partition_id=100)), weights=(1.0, 3.0))
    before = two.start(rule)
    first, second = two.updates(rule, before)
    after = rule.aggregate(before, [first, second])[0]
    other = rule.aggregate(before, [replace(first, weight=3.0), replace(second, weight=1.0)])[0]
    if rule.facts.uploaded and not rule.facts.custom_weights:
        moved = {n for n in effective(after) if relative(effective(other)[n], effective(after)[n]) > 1e-3}
        assert moved == rule.broadcast(before, one).modules
    if rule.facts.custom_weights:
        assert all(relative(delta, effective(after)[n]) < tolerance for n, delta in effective(other).items())
    for name, tensor in after.head.items():
        assert relative(numpy(other.head[name]), numpy(tensor)) > 1e-3


@every_rule
@given(federation=federations(min_clients=2), position=st.integers(0, 4))
def test_a_client_of_weight_zero_changes_nothing(rule: Rule, federation: Federation, position: int) -> None:
    """Not even where what it sent is not a number, as after training on no example."""
    federation = federation.suited(rule.facts)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    idle = position % len(updates)
    broken = replace(
        updates[idle],
        weight=0.0,
        adapters={
            n: replace(f, **{factor: t * torch.nan for factor, t in f.tensors().items()})
            for n, f in updates[idle].adapters.items()
        },
        head={n: t * torch.nan for n, t in updates[idle].head.items()},
    )
    others = [u for i, u in enumerate(updates) if i != idle]
    after, diagnostics = rule.aggregate(before, [*others, broken])
    expected, expected_diagnostics = rule.aggregate(before, others)
    assert_same_bits(named_tensors(after), named_tensors(expected))
    assert diagnostics == expected_diagnostics


@every_rule
@given(federation=federations(min_clients=1))
def test_a_round_in_which_nobody_moves_changes_nothing(rule: Rule, federation: Federation) -> None:
    """At the server's own rank: a start that is cut to fewer rows is a move."""
    clients = tuple(replace(c, rank=federation.rank) for c in federation.clients)
    federation = replace(federation, clients=clients)
    before = federation.start(rule)
    still = []
    for client, weight in zip(clients, federation.weights, strict=True):
        given = rule.broadcast(before, client)
        still.append(
            ClientUpdate(
                partition_id=client.partition_id, adapters=given.adapters, head=given.head, weight=weight
            )
        )
    after, diagnostics = rule.aggregate(before, still)
    assert_same_model(after, before)
    assert diagnostics.gap == 0.0


@every_rule
@given(federation=federations())
def test_a_given_adapter_is_where_the_run_starts(rule: Rule, federation: Federation) -> None:
    start, given = federation.start(rule), federation.template().adapters
    assert given is not None
    for name, factors in given.items():
        assert relative(effective(start)[name], numpy(factors.delta())) < 1e-12


@every_rule
@given(federation=federations())
def test_inputs_keep_their_bits(rule: Rule, federation: Federation) -> None:
    federation = federation.suited(rule.facts)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    tensors = [named_tensors(before), *(_tensors(u) for u in updates)]
    copies = [{name: t.clone() for name, t in group.items()} for group in tensors]
    weights = [u.weight for u in updates]
    rule.aggregate(before, updates)
    for client in federation.clients:
        rule.broadcast(before, client)
    for group, copy in zip(tensors, copies, strict=True):
        assert_same_bits(group, copy)
    assert before.round == 0
    assert [u.weight for u in updates] == weights


def _tensors(update: ClientUpdate) -> dict[str, torch.Tensor]:
    factors = {f"{x} {n}": t for n, f in update.adapters.items() for x, t in f.tensors().items()}
    return factors | dict(update.head)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(federation=federations())
def test_dtype_names_shapes_and_round_are_kept(
    rule: Rule, dtype: torch.dtype, federation: Federation
) -> None:
    federation = replace(federation.suited(rule.facts), dtype=dtype)
    before, _, after = played(rule, federation)
    assert {t.dtype for t in named_tensors(after).values()} == {dtype}
    assert list(after.adapters) == list(before.adapters)
    assert list(after.head) == list(before.head)
    assert (before.round, after.round, after.seed) == (0, 1, before.seed)
    for name, factors in after.adapters.items():
        start = before.adapters[name]
        assert factors.A.shape == start.A.shape
        assert factors.B.shape == start.B.shape
        assert factors.scaling == start.scaling


@every_rule
@given(federation=federations())
def test_what_moves_into_the_base_has_the_declared_rank(rule: Rule, federation: Federation) -> None:
    """At most R = sum_k r_k a round, or the declared 2 r; nothing from rules that do not move the base."""
    federation = federation.suited(rule.facts)
    before, _, after = played(rule, federation)
    patches = after.base[len(before.base) :]
    assert after.base[: len(before.base)] == before.base
    assert len(patches) <= int(rule.facts.updates_base)
    most = (
        2 * federation.rank if rule.facts.down.startswith("2r") else sum(c.rank for c in federation.clients)
    )
    for patch in patches:
        assert all(p.rank_bound <= most for p in patch.products.values())
    for name, delta in effective(after).items():
        rank = np.linalg.matrix_rank(delta)
        if not rule.facts.updates_base:
            assert rank <= federation.rank, name


@every_rule
@given(federation=federations())
def test_the_head_is_the_weighted_mean(rule: Rule, federation: Federation) -> None:
    federation = replace(federation.suited(rule.facts), head_shapes=((2, 3), (4,)))
    _, updates, after = played(rule, federation)
    total = sum(u.weight for u in updates)
    for name, tensor in after.head.items():
        mean = sum(u.weight / total * numpy(u.head[name]) for u in updates)
        assert relative(numpy(tensor), np.asarray(mean)) < 1e-14


@every_rule
@given(federation=federations())
def test_a_head_that_nobody_ships_stays(rule: Rule, federation: Federation) -> None:
    federation = replace(federation.suited(rule.facts), head_shapes=((2, 3),))
    before = federation.start(rule)
    kept = [replace(u, head={}) for u in federation.updates(rule, before)]
    assert_same_bits(rule.aggregate(before, kept)[0].head, before.head)


@every_rule
@given(federation=federations())
def test_everybody_starts_from_the_same_frozen_factor(rule: Rule, federation: Federation) -> None:
    """What is not trained has equal bits at all clients of one rank: exactness rests on that."""
    federation = federation.suited(rule.facts)
    state = federation.start(rule)
    clients = [replace(c, rank=federation.rank, scaling=federation.scaling) for c in federation.clients]
    starts = [rule.broadcast(state, client) for client in clients]
    for sent in starts:
        for name, factors in sent.adapters.items():
            for factor in factors.tensors().keys() - sent.trained:
                first = getattr(starts[0].adapters[name], factor)
                assert_same_bits({name: getattr(factors, factor)}, {name: first})


@every_rule
@given(federation=federations())
def test_a_client_starts_from_the_global_model_at_its_rank_and_scaling(
    rule: Rule, federation: Federation
) -> None:
    """Base patches + what is broadcast == the global weight, wherever the rank suffices for it."""
    federation = federation.suited(rule.facts)
    state = federation.start(rule)
    base = effective(replace(state, adapters={n: _zero(f) for n, f in state.adapters.items()}))
    for client in federation.clients:
        sent = rule.broadcast(state, client)
        for name, factors in sent.adapters.items():
            whole = rule.facts.name == "lora-a2"  # its clients have all directions and send some
            sized = federation if whole else client
            assert (factors.rank, factors.scaling) == (sized.rank, sized.scaling)
            if sized.rank >= federation.rank:
                seen = base[name] + numpy(factors.delta())
                assert relative(seen, effective(state)[name]) < 1e-12
        expected = frozenset(federation.modules) if client.modules is None else client.modules
        assert sent.modules == expected


def _zero(factors: LoraFactors) -> LoraFactors:
    return LoraFactors(factors.A, torch.zeros_like(factors.B), factors.scaling)
