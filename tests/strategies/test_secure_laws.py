"""The laws of rules once more where the server learns sums alone, for every listed rule that allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import wire
from fedlora.core.adapters import as_lora
from fedlora.core.factors import Tensors
from fedlora.core.state import Broadcast, ClientSpec, ClientUpdate, ModuleSpec, State
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.participant import Terms
from strategies.rule import Rule
from strategies.sums import Shipped, Sketched, rows_of
from tests.secure.rounds import UPLOAD, Round
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
TERMS, FIXED = Terms(min_clients=2, share=0.51, bits=64), FixedPoint(6, 64, 4096.0, 200)


def suited(federation: Federation, rule: Rule, *, alike: bool = False) -> Federation:
    """Clients with whole weights, and of one rank, scaling and target unless products are added up."""
    clients = [replace(c, partition_id=i) for i, c in enumerate(federation.clients)]
    if alike or not rule.facts.sketched:
        one = {"rank": federation.rank, "scaling": federation.scaling, "modules": None}
        clients = [replace(c, **one) for c in clients]
    whole = tuple(float(round(weight) + 1) for weight in federation.weights)
    return replace(federation, clients=tuple(clients), weights=whole, dtype=torch.float32)


def values(rows: Shipped, update: ClientUpdate, sent: Broadcast) -> Tensors:
    """What a client adds up."""
    if isinstance(rows, Sketched):
        return update.head | rows.sketch.sketches({n: as_lora(update.adapters[n]) for n in rows.layers})
    return wire.to_peft(update.adapters, update.head, sent.uploaded, sent.modules)


def summed(
    rule: Rule, federation: Federation, before: State, updates: Sequence[ClientUpdate], size: int = 0,
    vanish: Sequence[int] = (),
) -> State:  # fmt: skip
    """The state after a round of secure sums, without those that vanish before they upload."""
    sent = rule.broadcast(before, federation.clients[0])
    rows = rows_of(rule, before, federation.clients, size)
    start, masked = rows.start(sent), {}
    for update in updates:
        draws, trained = np.random.default_rng(update.partition_id), values(rows, update, sent)
        masked[update.partition_id] = wire.to_row(start, trained, int(update.weight), None, FIXED, draws)
    secure = Round(terms=TERMS, values=masked, vanish=dict.fromkeys(vanish, UPLOAD))
    mean = wire.from_row(secure.run(), start, FIXED)
    update, _ = rows.update(mean, sent, secure.collector.survivors)
    return rule.aggregate(before, [update])[0]


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
    before, updates, after = played(rule, suited(federation, rule))
    assert_same_model(after, rule.aggregate(before, updates)[0])


SUBSETS = [gone for n in range(3) for gone in combinations(range(5), n)]


@pytest.mark.parametrize("rule", [r for r in RULES.values() if r.facts.sketched], ids=lambda r: r.facts.name)
def test_whoever_vanishes_of_five_the_sketches_are_of_the_others_products(rule: Rule) -> None:
    """Every set that the threshold allows, of mixed ranks; wide sketches of layers that are not whole."""
    federation = suited(Federation(
        modules={n: ModuleSpec(out_features=o, in_features=60) for n, o in (("one", 70), ("other", 80))},
        clients=tuple(
            ClientSpec(partition_id=i, rank=r, scaling=1 / r) for i, r in enumerate((1, 2, 3, 3, 2))
        ),
        rank=3, scaling=2.0, seed=1,
        weights=(3.0, 1.0, 2.0, 5.0, 4.0),
    ), rule)  # fmt: skip
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    for gone in SUBSETS:
        stay = [update for update in updates if update.partition_id not in gone]
        after = summed(rule, federation, before, updates, vanish=gone)
        assert_same_model(after, rule.aggregate(before, stay)[0])


@every_rule
@given(federation=federations(min_clients=2), order=st.permutations(range(5)))
@few
def test_the_order_of_uploads_changes_no_bit(rule: Rule, federation: Federation, order: list[int]) -> None:
    """Nor do the masks, which are new each time."""
    federation = suited(federation, rule)
    before, updates, after = played(rule, federation)
    shuffled = [updates[i] for i in order if i < len(updates)]
    assert_same_bits(named_tensors(summed(rule, federation, before, shuffled)), named_tensors(after))


@every_rule
@given(federation=federations(min_clients=2), factor=st.integers(2, 4))
@few
def test_only_the_ratio_of_weights_counts(rule: Rule, federation: Federation, factor: int) -> None:
    federation = suited(federation, rule)
    before, updates, after = played(rule, federation)
    heavier = [replace(update, weight=update.weight * factor) for update in updates]
    assert_same_model(summed(rule, federation, before, heavier), after)


@every_rule
@given(federation=federations(min_clients=2))
@few
def test_a_client_of_weight_zero_changes_nothing(rule: Rule, federation: Federation) -> None:
    federation = suited(federation, rule)
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
    federation = suited(federation, rule, alike=True)
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
    federation = replace(suited(federation, rule), head_shapes=((2, 3), (4,)))
    before, updates, after = played(rule, federation)
    expected = rule.aggregate(before, updates)[0]
    given, wanted = (
        {n: (t.shape, t.dtype) for n, t in named_tensors(state).items()} for state in (after, expected)
    )
    if rule.facts.sketched:  # a patch of products that lack rank has their rounding, too
        given, wanted = ({n: s for n, s in shapes.items() if n[0] != "P"} for shapes in (given, wanted))
    assert given == wanted
    assert (after.round, after.seed) == (1, before.seed)
    total = sum(update.weight for update in updates)
    for name, tensor in after.head.items():
        mean = sum(update.weight / total * numpy(update.head[name]) for update in updates)
        assert relative(numpy(tensor), np.asarray(mean)) < TOLERANCE
