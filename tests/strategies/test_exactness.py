"""What the rules compute: the oracles' numbers, the clients' mean where they are exact, the true gap."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.state import ClientSpec, ClientUpdate, State
from strategies.registry import option_fields
from strategies.rule import Rule
from tests import oracles
from tests.strategies.federations import (
    OWN,
    VARIANTS,
    Federation,
    assert_same_bits,
    effective,
    federations,
    named_tensors,
    numpy,
    one_layer,
    oracle_layer,
    relative,
)

of_listed_rules = pytest.mark.skipif(bool(OWN), reason="of the listed rules alone")
every_rule = pytest.mark.parametrize("rule", VARIANTS.values(), ids=list(VARIANTS))
exact = {name: rule for name, rule in VARIANTS.items() if rule.facts.exact}
moving = {name: rule for name, rule in exact.items() if rule.facts.trained}
whole = {name: rule for name, rule in VARIANTS.items() if rule.facts.uploaded == {"A", "B"}}


def by_oracle(
    rule: Rule, state: State, updates: list[ClientUpdate], name: str
) -> tuple[oracles.Adapter, list[oracles.Client], oracles.Outcome]:
    """One layer's start, clients and next adapter according to the paper."""
    start, clients = oracle_layer(state, updates, name)
    if rule.facts.draws_ranks:
        pairs = zip(clients, updates, strict=True)
        clients = [replace(c, held=_held(rule, state, u, name)) for c, u in pairs]
    options: dict[str, Any] = {n: getattr(rule, n) for n in option_fields(type(rule)) if n != "init_a"}
    outcome = oracles.ORACLES[rule.facts.name](start, clients, state.round + 1, **options)
    return start, clients, outcome


def _held(rule: Rule, state: State, update: ClientUpdate, name: str) -> tuple[int, ...]:
    """Which rows of the global A a client was sent, found by their values."""
    spec = ClientSpec(partition_id=update.partition_id, rank=update.adapters[name].rank, scaling=1.0)
    sent, whole = rule.broadcast(state, spec).adapters[name].A, state.adapters[name].A
    return tuple(int((whole == row).all(dim=1).nonzero()) for row in sent)


def asked(state: State, updates: list[ClientUpdate], name: str) -> oracles.Array:
    """``sum_k p_k dW_k``, dW_k from the global weight before the round."""
    start, clients = oracle_layer(state, updates, name)
    return oracles.mean_update(clients) - start.delta()


@of_listed_rules
@every_rule
@given(federation=federations())
def test_one_round_is_the_papers(rule: Rule, federation: Federation) -> None:
    """Next adapter and base change equal the dense oracle's; LoRA-FAIR's both minimise, to 1e-6."""
    federation = federation.suited(rule.facts)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, _ = rule.aggregate(before, updates)
    base_before, base_after = _base_only(before), _base_only(after)
    for name, factors in after.adapters.items():
        _, clients, outcome = by_oracle(rule, before, updates, name)
        moved, size = base_after[name] - base_before[name], np.linalg.norm(oracles.mean_update(clients))
        assert relative(numpy(factors.delta()), outcome.adapter.delta()) < 1e-6, name
        assert np.linalg.norm(moved - outcome.into_base) <= 1e-10 * size, name


def _base_only(state: State) -> dict[str, oracles.Array]:
    empty = {
        n: replace(f, B=torch.zeros_like(f.B), A=torch.zeros_like(f.A)) for n, f in state.adapters.items()
    }
    return effective(replace(state, adapters=empty))


@of_listed_rules
@every_rule
@given(federation=federations(min_clients=2), presence=st.lists(st.integers(1, 30), min_size=4, max_size=4))
def test_rounds_in_sequence_follow_the_papers(
    rule: Rule, federation: Federation, presence: list[int]
) -> None:
    """Four rounds with other clients away in each: a dense server with the oracle stays beside the rule."""
    federation = federation.suited(rule.facts)
    state = federation.start(rule)
    base = {name: np.zeros_like(delta) for name, delta in effective(state).items()}
    base = {name: b + _base_only(state)[name] for name, b in base.items()}
    for mask in presence:
        present = {i for i in range(len(federation.clients)) if mask >> i & 1} or {0}
        updates = federation.updates(rule, state, present)
        outcomes = {name: by_oracle(rule, state, updates, name)[2] for name in state.adapters}
        state, _ = rule.aggregate(state, updates)
        for name, outcome in outcomes.items():
            base[name] = base[name] + outcome.into_base
            assert relative(effective(state)[name], base[name] + outcome.adapter.delta()) < 1e-6, name
    assert state.round == len(presence)


@pytest.mark.parametrize("rule", exact.values(), ids=list(exact))
@given(federation=federations(min_clients=2), presence=st.lists(st.integers(1, 30), min_size=3, max_size=3))
def test_exact_rules_give_the_clients_mean_round_after_round(
    rule: Rule, federation: Federation, presence: list[int]
) -> None:
    """W_after == W_before + sum_k p_k dW_k, for mixed ranks, alphas, weights and target modules."""
    federation = federation.suited(rule.facts)
    state = federation.start(rule)
    for mask in presence:
        present = {i for i in range(len(federation.clients)) if mask >> i & 1} or {0}
        updates = federation.updates(rule, state, present)
        before, wanted = effective(state), {n: asked(state, updates, n) for n in state.adapters}
        state, _ = rule.aggregate(state, updates)
        for name, delta in effective(state).items():
            expected = before[name] + wanted[name]
            assert np.linalg.norm(delta - expected) <= 1e-10 * (1.0 + np.linalg.norm(expected)), name


@every_rule
@pytest.mark.parametrize("seed", range(2))
def test_the_fact_exact_is_true(rule: Rule, seed: int) -> None:
    """On random factors the inexact rules miss by more than a tenth, the exact ones by rounding."""
    federation = one_layer(seed)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, diagnostics = rule.aggregate(before, updates)
    moved = effective(after)["layer"] - effective(before)["layer"]
    wanted = asked(before, updates, "layer")
    miss = np.linalg.norm(moved - wanted)
    if rule.facts.exact:
        assert miss <= 1e-10 * (1.0 + np.linalg.norm(wanted))
        assert diagnostics.gap < 1e-6
    else:
        assert miss > 0.1 * np.linalg.norm(wanted)
        assert diagnostics.gap > 0.1


@every_rule
@given(federation=federations(min_clients=2))
def test_the_reported_gap_is_the_dense_one(rule: Rule, federation: Federation) -> None:
    """All layers together: sqrt(sum of squared misses) / sqrt(sum of squared requests)."""
    federation = federation.suited(rule.facts)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, diagnostics = rule.aggregate(before, updates)
    missed = requested = size = 0.0
    for name, start in before.adapters.items():
        wanted = asked(before, updates, name)
        moved = effective(after)[name] - effective(before)[name]
        missed += float(np.linalg.norm(moved - wanted)) ** 2
        requested += float(np.linalg.norm(wanted)) ** 2
        size += float(np.linalg.norm(wanted + numpy(start.delta()))) ** 2
    rounding = 1e-6 * math.sqrt(size)
    assert diagnostics.update_norm == pytest.approx(math.sqrt(requested), abs=rounding)
    if requested > 1e-4 * size:
        assert diagnostics.gap == pytest.approx(math.sqrt(missed / requested), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rule", exact.values(), ids=list(exact))
@given(federation=federations(dtype=torch.float32, min_clients=2))
def test_the_gap_of_exact_rules_is_rounding_in_float32(rule: Rule, federation: Federation) -> None:
    """Rounding of the weights themselves: 1e-6 of T, however small the change that was asked for."""
    federation = federation.suited(rule.facts)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    _, diagnostics = rule.aggregate(before, updates)
    targets = [asked(before, updates, n) + numpy(f.delta()) for n, f in before.adapters.items()]
    size = math.sqrt(sum(float(np.linalg.norm(target)) ** 2 for target in targets))
    assert diagnostics.gap * diagnostics.update_norm <= 1e-6 * size


keeping = {name: rule for name, rule in whole.items() if rule.facts.single_client_exact}


def _comparable(rule: Rule, federation: Federation) -> Federation:
    """Rules on factors at the global rank: below it the rest of the global adapter is theirs to keep."""
    if rule.facts.product_invariant:
        return federation
    return replace(federation, clients=tuple(replace(c, rank=federation.rank) for c in federation.clients))


@pytest.mark.parametrize("rule", keeping.values(), ids=list(keeping))
@given(federation=federations())
def test_one_client_alone_is_the_new_global_model(rule: Rule, federation: Federation) -> None:
    federation = _comparable(rule, federation)
    alone = replace(federation, clients=federation.clients[:1], weights=(1.0,))
    before = alone.start(rule)
    updates = alone.updates(rule, before)
    after, diagnostics = rule.aggregate(before, updates)
    base = _base_only(before)
    for name, delta in effective(after).items():
        assert relative(delta, base[name] + numpy(updates[0].adapters[name].delta())) < 1e-6
    assert diagnostics.gap < 1e-6


@pytest.mark.parametrize("rule", keeping.values(), ids=list(keeping))
@given(federation=federations())
def test_identical_clients_are_the_new_global_model(rule: Rule, federation: Federation) -> None:
    federation = _comparable(rule, federation)
    before = federation.start(rule)
    one = federation.update(rule, before, 0)
    same = [
        replace(one, partition_id=c.partition_id, weight=w)
        for c, w in zip(federation.clients, federation.weights, strict=True)
    ]
    after, _ = rule.aggregate(before, same)
    base = _base_only(before)
    for name, delta in effective(after).items():
        assert relative(delta, base[name] + numpy(one.adapters[name].delta())) < 1e-6


# --- what the rules act on: products or factors -------------------------------------------------------


def _turned(update: ClientUpdate, federation: Federation, common: bool) -> ClientUpdate:
    """``(B G, G^-1 A)``, a core ``G^-1 R G``, with a good G, of its own for each client unless ``common``."""
    who: tuple[int, ...] = () if common else (update.partition_id,)
    adapters = {}
    for name, f in update.adapters.items():
        Q, _ = torch.linalg.qr(federation.normal((f.rank, f.rank), "gauge", f.rank, *who))
        G = Q * torch.linspace(0.5, 2.0, f.rank, dtype=Q.dtype)
        R = None if f.R is None else torch.linalg.solve(G, f.R @ G)
        adapters[name] = replace(f, A=torch.linalg.solve(G, f.A), B=f.B @ G, R=R)
    return replace(update, adapters=adapters)


product_invariant = {n: r for n, r in whole.items() if r.facts.product_invariant}
of_factors = {n: r for n, r in whole.items() if not r.facts.product_invariant}


@pytest.mark.parametrize("rule", product_invariant.values(), ids=list(product_invariant))
@given(federation=federations(min_clients=2))
def test_rules_on_products_do_not_see_the_clients_bases(rule: Rule, federation: Federation) -> None:
    """An exact rule in which both factors are trained at once cannot depend on how a product is split."""
    federation = federation.suited(rule.facts)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, _ = rule.aggregate(before, updates)
    turned, _ = rule.aggregate(before, [_turned(u, federation, common=False) for u in updates])
    for name, delta in effective(turned).items():
        assert relative(delta, effective(after)[name]) < 1e-10


@pytest.mark.parametrize("rule", of_factors.values(), ids=list(of_factors))
@pytest.mark.parametrize("seed", range(2))
def test_rules_on_factors_do_see_them(rule: Rule, seed: int) -> None:
    """The same client models, written in other bases, give FedAvg another global model.

    One client has a lower rank, where it may: with equal ones, raFLoRA sees products alone.
    """
    federation = one_layer(seed)
    lower = replace(federation.clients[-1], rank=2)
    federation = replace(federation, clients=(*federation.clients[:-1], lower)).suited(rule.facts)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, _ = rule.aggregate(before, updates)
    turned, _ = rule.aggregate(before, [_turned(u, federation, common=False) for u in updates])
    assert relative(effective(turned)["layer"], effective(after)["layer"]) > 0.1


based = {name: rule for name, rule in moving.items() if not rule.core_in_blocks}
"""A basis that mixes directions makes a core in blocks dense."""


@pytest.mark.parametrize("rule", based.values(), ids=list(based))
@given(federation=federations(min_clients=2))
def test_exact_rules_do_not_see_a_common_basis(rule: Rule, federation: Federation) -> None:
    """One G for the server's start and all clients, so a shared frozen A stays shared."""
    clients = tuple(replace(c, rank=federation.rank) for c in federation.clients)
    federation = replace(federation, clients=clients)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, _ = rule.aggregate(before, updates)
    start = ClientUpdate(partition_id=0, adapters=before.adapters, head={}, weight=1.0)
    turned_start = replace(before, adapters=_turned(start, federation, common=True).adapters)
    turned, _ = rule.aggregate(turned_start, [_turned(u, federation, common=True) for u in updates])
    for name, delta in effective(turned).items():
        assert relative(delta, effective(after)[name]) < 1e-10


@of_listed_rules
@pytest.mark.parametrize(("keeps", "drops"), [("fedex", "zero-padding"), ("fedmomentum", "flexlora")])
@given(federation=federations())
def test_a_rule_that_keeps_the_remainder_has_the_adapter_of_the_one_that_drops_it(
    keeps: str, drops: str, federation: Federation
) -> None:
    """Bit for bit: the two differ in the fate of the remainder alone."""
    rule, other = VARIANTS[keeps], VARIANTS[drops]
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    kept, dropped = rule.aggregate(before, updates)[0], other.aggregate(before, updates)[0]
    assert_same_bits(named_tensors(replace(kept, base=())), named_tensors(dropped))
