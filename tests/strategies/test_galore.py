"""GaLore by turns: exact, orthonormal projectors out of what the last round moved, everything in the base."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from scipy.fft import dct

from fedlora.core.adapters import as_lora
from fedlora.core.state import ClientUpdate, ModuleSpec, State
from fedlora.errors import ConfigError, NotApplicable
from strategies.allocation import make_allocation
from strategies.registry import make_rule
from strategies.rule import Rule
from strategies.rules.galore import PROJECTORS
from strategies.server_optimizer import ServerOptimizer
from tests import oracles
from tests.strategies.federations import Federation, effective, federations, numpy, one_layer, relative

NAMES = sorted(PROJECTORS)
LAYER = replace(one_layer(), modules={"layer": ModuleSpec(out_features=20, in_features=24)})


def played(rule: Rule, rounds: int, federation: Federation = LAYER) -> list[State]:
    states = [federation.start(rule)]
    for _ in range(rounds):
        states.append(rule.aggregate(states[-1], federation.updates(rule, states[-1]))[0])
    return states


def sides(state: State) -> tuple[oracles.Array, oracles.Array]:
    """B (out, r) and A (r, in) of the one layer."""
    factors = as_lora(state.adapters["layer"])
    return numpy(factors.B), numpy(factors.A)


def patch(state: State) -> oracles.Array:
    """What the last round moved into the base."""
    return numpy(state.base[-1].products["layer"].dense())


@pytest.mark.parametrize("name", NAMES)
def test_the_frozen_side_is_orthonormal_and_the_trained_one_begins_at_zero(name: str) -> None:
    for t, state in enumerate(played(make_rule("galore", {"projector": name}), 4)[1:], start=1):
        B, A = sides(state)
        frozen, trained = (B.T, A) if t % 2 else (A, B)
        np.testing.assert_allclose(frozen @ frozen.T, np.eye(3), atol=1e-12)
        assert not trained.any()
        assert len(state.base) == t


def test_a_round_freezes_what_the_round_before_it_moved() -> None:
    """Odd rounds tell the column space of the next, even ones the row space: a subspace iteration."""
    for t, state in enumerate(played(make_rule("galore"), 4)[1:], start=1):
        U, _, Vt = np.linalg.svd(patch(state), full_matrices=False)
        frozen, found = (sides(state)[0].T, U[:, :3].T) if t % 2 else (sides(state)[1], Vt[:3])
        np.testing.assert_allclose(np.abs(frozen @ found.T), np.eye(3), atol=1e-9)


def test_two_rounds_learn_rank_directions_and_the_next_two_as_many_more() -> None:
    """The second of two rounds trains in the column space of the first."""
    totals = [effective(state)["layer"] for state in played(make_rule("galore"), 6)[1:]]
    assert [np.linalg.matrix_rank(total) for total in totals] == [3, 3, 6, 6, 9, 9]


def test_cosines_are_those_that_hold_most_of_what_was_moved() -> None:
    state = played(make_rule("galore", {"projector": "dct"}), 1)[-1]
    basis = dct(np.eye(20), norm="ortho", axis=0)  # (frequency, place)
    energy = (basis @ patch(state)) ** 2
    best = np.sort(np.argsort(-energy.sum(axis=1))[:3])
    np.testing.assert_allclose(sides(state)[0].T, basis[best], atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(federation=federations())
def test_nothing_is_lost_on_the_way_into_the_base(name: str, federation: Federation) -> None:
    rule = make_rule("galore", {"projector": name})
    for before, after in pairwise(played(rule, 2, federation.suited(rule.facts))):
        for layer, adapter in after.adapters.items():
            factors = as_lora(adapter)
            moved = effective(after)[layer] - effective(before)[layer]
            last = after.base[-1].products.get(layer)
            begun = numpy(as_lora(before.adapters[layer]).delta())
            if last is not None:
                assert relative(moved, numpy(last.dense()) - begun) < 1e-9
                assert not factors.A.any() or not factors.B.any()


def test_momentum_is_carried_into_the_new_directions() -> None:
    """Where a second round's clients stay where they were, it moves by what is remembered of the first."""
    heavy = make_rule("galore", optimizer=ServerOptimizer(name="fedavgm", beta_1=0.5))
    start = LAYER.start(heavy)
    begun = {
        name: as_lora(f).replaced({"B": torch.zeros_like(as_lora(f).B)}) for name, f in start.adapters.items()
    }
    start = replace(start, adapters=begun)
    first, _ = heavy.aggregate(start, LAYER.updates(heavy, start))
    for t in (2, 3):
        state, _ = heavy.aggregate(first, resting(heavy, first))
        np.testing.assert_allclose(patch(state), 0.5 * patch(first), atol=1e-9, err_msg=f"round {t}")
        first = state


def resting(rule: Rule, state: State) -> list[ClientUpdate]:
    """Replies of clients that changed nothing of their adapters."""
    given = [rule.broadcast(state, client).adapters for client in LAYER.clients]
    return [replace(u, adapters=dict(g)) for u, g in zip(LAYER.updates(rule, state), given, strict=True)]


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"strategy.options projector = 'svd'.*aggregate, dct, random"):
        make_rule("galore", {"projector": "svd"})
    for name in ("random-layers", "sized-ranks"):
        with pytest.raises(NotApplicable, match="galore begins at zero with what the round trains"):
            make_rule("galore", allocation=make_allocation(name, {}))


def test_a_layer_that_nobody_moved_trains_again() -> None:
    """A product of zeros tells no direction: the frozen side is drawn."""
    rule = make_rule("galore")
    state = LAYER.start(rule)
    for name in ("B", "A"):
        given = rule.broadcast(state, LAYER.clients[0])
        zero = {n: f.replaced({name: torch.zeros_like(getattr(f, name))}) for n, f in given.adapters.items()}
        state, _ = rule.aggregate(state, [replace(u, adapters=zero) for u in LAYER.updates(rule, state)])
        B, A = sides(state)
        frozen = B.T if name == "B" else A
        np.testing.assert_allclose(frozen @ frozen.T, np.eye(3), atol=1e-12)
