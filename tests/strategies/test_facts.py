"""Every declared fact is what the rule does: what it trains, ships, sums and moves, and its bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedlora.core.factors import FACTORS, LoraFactors
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State
from strategies.registry import RULES, make_rule
from strategies.rule import Rule
from tests import oracles
from tests.strategies.federations import Federation, assert_same_bits, effective, named_tensors, relative

OUT, IN, RANK = 10, 13, 3
FEDERATION = Federation(
    modules={"layer": ModuleSpec(out_features=OUT, in_features=IN)},
    rank=RANK,
    scaling=2.0,
    clients=tuple(ClientSpec(partition_id=i, rank=RANK, scaling=2.0) for i in range(3)),
    weights=(1.0, 2.0, 3.0),
    seed=3,
)

rules = {name: make_rule(name) for name in RULES}
every_rule = pytest.mark.parametrize("rule", rules.values(), ids=list(rules))
every_factor = pytest.mark.parametrize("factor", sorted(FACTORS))
every_turn = pytest.mark.parametrize("rounds", [0, 1])
"""After none or one round: a rule may train its factors in turn."""


def replies(rule: Rule, rounds: int = 0, *, lower: bool = False) -> tuple[State, list[ClientUpdate]]:
    """The state after some rounds and the next updates, with ``lower`` of clients below the global rank."""
    clients = tuple(replace(c, rank=RANK - 1) for c in FEDERATION.clients) if lower else FEDERATION.clients
    federation = replace(FEDERATION, clients=clients)
    state = federation.start(rule)
    for _ in range(rounds):
        state, _ = rule.aggregate(state, federation.updates(rule, state))
    return state, federation.updates(rule, state)


def shifted(update: ClientUpdate, factor: str, by: torch.Tensor) -> ClientUpdate:
    moved = {n: replace(f, **{factor: getattr(f, factor) + by}) for n, f in update.adapters.items()}
    return replace(update, adapters=moved)


def difference(one: State, other: State) -> float:
    return relative(effective(one)["layer"], effective(other)["layer"])


def begun(rule: Rule, one: State, other: State) -> float:
    """How far apart a client's next rounds begin, where that is not the global adapter."""
    if not rule.facts.by_client:
        return 0.0
    of = (rule.broadcast(state, FEDERATION.clients[0]).adapters["layer"] for state in (one, other))
    return relative(*(f.scaling * f.B @ f.A for f in of))


def test_every_rule_is_listed_under_its_own_name_with_an_oracle() -> None:
    assert {name: rule.facts.name for name, rule in RULES.items()} == {name: name for name in RULES}
    assert set(RULES) <= set(oracles.ORACLES)


@every_rule
def test_only_trained_factors_are_shipped(rule: Rule) -> None:
    facts = rule.facts
    assert facts.uploaded <= facts.trained <= FACTORS
    start = FEDERATION.start(rule)
    given = [rule.broadcast(replace(start, round=t), FEDERATION.clients[0]) for t in range(4)]
    for t, sent in enumerate(given):
        assert sent.uploaded <= sent.trained
        assert (sent.trained, sent.uploaded) == (rule.trained(t + 1), rule.shipped(t + 1))
    assert frozenset().union(*(sent.trained for sent in given)) == facts.trained
    assert frozenset().union(*(sent.uploaded for sent in given)) == facts.uploaded


@every_rule
@every_factor
@every_turn
def test_the_next_adapter_depends_on_what_is_shipped_and_on_nothing_else(
    rule: Rule, factor: str, rounds: int
) -> None:
    """NaN in a factor that stays at the client reaches no tensor of the next state."""
    state, updates = replies(rule, rounds)
    after, _ = rule.aggregate(state, updates)
    if factor not in updates[0].adapters["layer"].tensors():
        assert factor not in rule.trained(state.round + 1)
    elif factor in rule.shipped(state.round + 1):
        moved = [shifted(updates[0], factor, torch.tensor(0.5)), *updates[1:]]
        assert difference(rule.aggregate(state, moved)[0], after) > 1e-3
    else:
        hidden = [shifted(u, factor, torch.tensor(math.nan)) for u in updates]
        assert_same_bits(named_tensors(rule.aggregate(state, hidden)[0]), named_tensors(after))


@every_rule
@every_turn
def test_secure_sum_and_client_dp_are_claimed_where_only_the_mean_counts(rule: Rule, rounds: int) -> None:
    """Moving some of a shipped factor from one client to another, at equal sum p_k X_k, changes nothing.

    One factor at a time, so that for a product rule the other factor tells the clients apart.
    """
    state, updates = replies(rule, rounds, lower=rule.facts.draws_ranks)
    after, _ = rule.aggregate(state, updates)
    changes = [0.0]
    for factor in rule.shipped(state.round + 1):
        by = FEDERATION.normal(getattr(updates[0].adapters["layer"], factor).shape, "moved", factor)
        one = shifted(updates[0], factor, by / updates[0].weight)
        two = shifted(updates[-1], factor, -by / updates[-1].weight)
        moved = rule.aggregate(state, [one, *updates[1:-1], two])[0]
        changes += [difference(moved, after), begun(rule, moved, after)]
    if rule.facts.secure_sum and not rule.facts.sketched:
        assert max(changes) < 1e-10
    else:
        assert max(changes) > 1e-3
    assert rule.facts.secure_sum or not rule.facts.client_dp


@every_rule
def test_the_base_moves_where_declared(rule: Rule) -> None:
    state, updates = replies(rule)
    assert (len(rule.aggregate(state, updates)[0].base) > len(state.base)) == rule.facts.updates_base


# --- bytes --------------------------------------------------------------------------------------------

FORMULAS: dict[str, Callable[[int, int, int], int]] = {
    "0": lambda r, o, i: 0,
    "r*o": lambda r, o, i: r * o,
    "r*i": lambda r, o, i: r * i,
    "r^2": lambda r, o, i: r * r,
    "r(o+i)": lambda r, o, i: r * (o + i),
    "r_k(o+i)": lambda r, o, i: r * (o + i),
    "r_k*o": lambda r, o, i: r * o,
    "r_k*i": lambda r, o, i: r * i,
}
"""The spellings of ``facts.up`` and ``facts.down``; r is the client's rank."""

DOWN: dict[str, Callable[[int, int, int, int], int]] = {
    "0": lambda r, m, o, i: 0,
    "r*o": lambda r, m, o, i: r * o,
    "r*i": lambda r, m, o, i: r * i,
    "r^2": lambda r, m, o, i: r * r,
    "r(o+i)": lambda r, m, o, i: r * (o + i),
    "R(o+i)": lambda r, m, o, i: m * r * (o + i),
    "2r(o+i)": lambda r, m, o, i: 2 * r * (o + i),
    "r_k(o+i)": lambda r, m, o, i: r * (o + i),
    "r_k(o+i)+(R-r)(o+i)": lambda r, m, o, i: r * (o + i) + (m * r - r) * (o + i),
    "(r+n)(o+i)": lambda r, m, o, i: (r + max(1, round(r / 4))) * (o + i),
}
"""The spellings of ``facts.down`` up to the first blank; m clients of rank r each, so that R = m r."""


def spelling(text: str, server_round: int) -> str:
    """The formula in ``facts.up`` or ``facts.down`` for a round, or for the way down after it.

    ``x / y in turn`` is x for odd rounds and y for even ones; else it is what stands before the first blank.
    """
    if not text.endswith(" in turn"):
        return text.split(" ")[0]
    return text.removesuffix(" in turn").split(" / ")[(server_round - 1) % 2]


@every_rule
@pytest.mark.parametrize("server_round", [1, 2])
@pytest.mark.parametrize(("rank", "out_features", "in_features"), [(1, 5, 5), (3, 7, 11), (4, 12, 6)])
def test_bytes_up_are_the_closed_form(
    rule: Rule, rank: int, out_features: int, in_features: int, server_round: int
) -> None:
    A, B, R = torch.zeros(rank, in_features), torch.zeros(out_features, rank), torch.zeros(rank, rank)
    factors = LoraFactors(A, B, 1.0, R)
    shipped = sum(getattr(factors, factor).nbytes for factor in rule.shipped(server_round))
    formula = FORMULAS[spelling(rule.facts.up, server_round)]
    assert shipped == 4 * formula(rank, out_features, in_features)


@every_rule
@every_turn
def test_bytes_down_are_the_closed_form(rule: Rule, rounds: int) -> None:
    """What differs from the round before, or the new patch, is what has to travel to a client."""
    state, updates = replies(rule, rounds)
    after, _ = rule.aggregate(state, updates)
    client = FEDERATION.clients[0]
    old, new = rule.broadcast(state, client), rule.broadcast(after, client)
    numbers = sum(patch.nbytes // 8 for patch in after.base[len(state.base) :])
    if new.fresh_seed is None:
        for factor in old.adapters["layer"].tensors():
            before, now = (given.adapters["layer"].tensors()[factor] for given in (old, new))
            numbers += 0 if torch.equal(before, now) else now.numel()
    formula = spelling(rule.facts.down, after.round)
    expected = DOWN[formula](RANK, len(updates), OUT, IN)
    assert 0 < numbers < expected if "at most" in rule.facts.down else numbers == expected
