"""The laws of rules once more where the server learns sums alone, for every listed rule that allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import wire
from fedlora.core.state import ClientUpdate, State
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.participant import Terms
from strategies.rule import Rule
from strategies.secure import virtual_update
from tests.secure.rounds import Round
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

RULES = {name: rule for name, rule in DEFAULTS.items() if rule.facts.secure_sum}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
few = settings(max_examples=8, deadline=None)
TOLERANCE = 1e-5
"""Relative: sums of 64 bits are exact to far below the float32 that a mean becomes."""
TERMS, FIXED = Terms(min_clients=2, share=0.66, bits=64), FixedPoint(6, 64, 64.0, 200)


def suited(federation: Federation) -> Federation:
    """Clients of one rank, scaling and target, whose weights are whole numbers, as secure sums take them."""
    clients = [
        replace(c, partition_id=i, rank=federation.rank, scaling=federation.scaling, modules=None)
        for i, c in enumerate(federation.clients)
    ]
    whole = tuple(float(round(weight) + 1) for weight in federation.weights)
    return replace(federation, clients=tuple(clients), weights=whole, dtype=torch.float32)


def rows(rule: Rule, federation: Federation, before: State, updates: Sequence[ClientUpdate]) -> Round:
    """What each client puts under masks."""
    sent = rule.broadcast(before, federation.clients[0])
    start = wire.to_peft(sent.adapters, sent.head, sent.uploaded, sent.modules)
    values = {}
    for update in updates:
        trained = wire.to_peft(update.adapters, update.head, sent.uploaded, sent.modules)
        draws = np.random.default_rng(update.partition_id)
        row = wire.to_row(start, trained, int(update.weight), None, FIXED, draws)
        values[update.partition_id] = row
    return Round(terms=TERMS, values=values)


def summed(rule: Rule, federation: Federation, before: State, updates: Sequence[ClientUpdate]) -> State:
    """The state after a round of secure sums."""
    sent = rule.broadcast(before, federation.clients[0])
    start = wire.to_peft(sent.adapters, sent.head, sent.uploaded, sent.modules)
    total = rows(rule, federation, before, updates).run()
    mean = wire.from_row(total, start, FIXED)
    return rule.aggregate(before, [virtual_update(mean, sent)])[0]


def played(rule: Rule, federation: Federation) -> tuple[State, list[ClientUpdate], State]:
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    return before, updates, summed(rule, federation, before, updates)


def assert_same_model(given: State, expected: State) -> None:
    dense = effective(expected)
    for name, delta in effective(given).items():
        assert relative(delta, dense[name]) < TOLERANCE, name
    for name, tensor in given.head.items():
        assert relative(numpy(tensor), numpy(expected.head[name])) < TOLERANCE, name


@every_rule
@given(federation=federations(min_clients=2))
@few
def test_a_sum_makes_of_the_state_what_the_updates_make(rule: Rule, federation: Federation) -> None:
    before, updates, after = played(rule, suited(federation))
    assert_same_model(after, rule.aggregate(before, updates)[0])


@every_rule
@given(federation=federations(min_clients=2), order=st.permutations(range(5)))
@few
def test_the_order_of_uploads_changes_no_bit(rule: Rule, federation: Federation, order: list[int]) -> None:
    """Nor do the masks, which are new each time."""
    federation = suited(federation)
    before, updates, after = played(rule, federation)
    shuffled = [updates[i] for i in order if i < len(updates)]
    assert_same_bits(named_tensors(summed(rule, federation, before, shuffled)), named_tensors(after))


@every_rule
@given(federation=federations(min_clients=2), factor=st.integers(2, 4))
@few
def test_only_the_ratio_of_weights_counts(rule: Rule, federation: Federation, factor: int) -> None:
    federation = suited(federation)
    before, updates, after = played(rule, federation)
    heavier = [replace(update, weight=update.weight * factor) for update in updates]
    assert_same_model(summed(rule, federation, before, heavier), after)


@every_rule
@given(federation=federations(min_clients=2))
@few
def test_a_client_of_weight_zero_changes_nothing(rule: Rule, federation: Federation) -> None:
    federation = suited(federation)
    idle = replace(federation.clients[0], partition_id=99)
    before, updates, after = played(rule, replace(federation, clients=federation.clients[:4]))
    more = replace(
        federation, clients=(*federation.clients[:4], idle), weights=(*federation.weights[:4], 0.0)
    )
    assert_same_model(summed(rule, more, before, [*updates, more.updates(rule, before)[-1]]), after)


@every_rule
@given(federation=federations(min_clients=2))
@few
def test_a_round_in_which_nobody_moves_changes_nothing(rule: Rule, federation: Federation) -> None:
    federation = suited(federation)
    before = federation.start(rule)
    sent = rule.broadcast(before, federation.clients[0])
    still = [
        ClientUpdate(partition_id=c.partition_id, adapters=sent.adapters, head=sent.head, weight=weight)
        for c, weight in zip(federation.clients, federation.weights, strict=True)
    ]
    assert_same_model(summed(rule, federation, before, still), before)


@every_rule
@given(federation=federations(min_clients=2))
@few
def test_names_shapes_round_and_the_head_are_as_without(rule: Rule, federation: Federation) -> None:
    federation = replace(suited(federation), head_shapes=((2, 3), (4,)))
    before, updates, after = played(rule, federation)
    expected = rule.aggregate(before, updates)[0]
    assert {n: (t.shape, t.dtype) for n, t in named_tensors(after).items()} == {
        n: (t.shape, t.dtype) for n, t in named_tensors(expected).items()
    }
    assert (after.round, after.seed) == (1, before.seed)
    total = sum(update.weight for update in updates)
    for name, tensor in after.head.items():
        mean = sum(update.weight / total * numpy(update.head[name]) for update in updates)
        assert relative(numpy(tensor), np.asarray(mean)) < TOLERANCE
