"""Fed-SB: what is frozen, where the subspace comes from, and that no product is lost on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientSpec, ModuleSpec, State, Template
from fedlora.errors import ConfigError, FactorShapeError
from strategies.registry import make_rule
from strategies.rules.fed_sb import FedSBRule
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

OUT, IN, RANK, SCALING = 11, 8, 3, 2.5
MODULES = {"a": ModuleSpec(out_features=OUT, in_features=IN), "b": ModuleSpec(out_features=5, in_features=9)}
EMPTY = Template(modules=MODULES, rank=RANK, scaling=SCALING)
FEDERATION = Federation(
    modules=MODULES,
    rank=RANK,
    scaling=SCALING,
    clients=tuple(ClientSpec(partition_id=i, rank=RANK, scaling=s) for i, s in enumerate((2.5, 1.0, 4.0))),
    weights=(1.0, 2.0, 3.0),
    seed=5,
)
FEW = replace(FEDERATION, clients=tuple(replace(c, modules=frozenset({"a"})) for c in FEDERATION.clients))
"""A federation in which nobody trains layer b."""


def gradients() -> dict[str, torch.Tensor]:
    return {
        name: FEDERATION.normal((spec.out_features, spec.in_features), "gradient", name)
        for name, spec in MODULES.items()
    }


def rounds(rule: FedSBRule, number: int, federation: Federation = FEDERATION) -> list[State]:
    """The states of a run from scratch in float64, the start first."""
    template = replace(
        EMPTY,
        gradients=gradients() if rule.gradient_examples else None,
        weight=weights().__getitem__ if rule.base_weights else None,
    )
    start = rule.init(template, federation.seed)
    doubled = {
        name: replace(f, **{factor: tensor.double() for factor, tensor in f.tensors().items()})
        for name, f in start.adapters.items()
    }
    states = [replace(start, adapters=doubled)]
    for _ in range(number):
        states.append(rule.aggregate(states[-1], federation.updates(rule, states[-1]))[0])
    return states


def assert_orthonormal(factors: LoraFactors) -> None:
    B, A = numpy(factors.B), numpy(factors.A)
    assert np.abs(B.T @ B - np.eye(factors.rank)).max() < 1e-6
    assert np.abs(A @ A.T - np.eye(factors.rank)).max() < 1e-6


def core(factors: LoraFactors) -> oracles.Array:
    assert factors.R is not None
    return numpy(factors.R)


@given(federation=federations(min_clients=2))
def test_the_mean_of_the_products_is_the_product_with_the_mean_core(federation: Federation) -> None:
    """For unequal weights and scalings, with the same B and A before and after, bit for bit."""
    rule = FedSBRule()
    federation = federation.suited(rule.facts)
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, _ = rule.aggregate(before, updates)
    for name, factors in after.adapters.items():
        wanted = oracles.mean_update(oracle_layer(before, updates, name)[1])
        assert relative(numpy(factors.delta()), wanted) < 1e-12
        assert_same_bits(
            {"A": factors.A, "B": factors.B}, {"A": before.adapters[name].A, "B": before.adapters[name].B}
        )


def weights() -> dict[str, torch.Tensor]:
    return {
        name: FEDERATION.normal((spec.out_features, spec.in_features), "weight", name).float()
        for name, spec in MODULES.items()
    }


@pytest.mark.parametrize("subspace", ["random", "public"])
def test_the_subspace_is_fixed_from_the_start_and_only_the_core_moves(subspace: str) -> None:
    rule = FedSBRule(subspace=subspace)
    first, *_, last = rounds(rule, 4)
    for t in range(1, 6):
        assert rule.trained(t) == rule.shipped(t) == {"R"}
    for name, factors in last.adapters.items():
        start = first.adapters[name]
        assert_same_bits({"A": factors.A, "B": factors.B}, {"A": start.A, "B": start.B})
        assert np.linalg.norm(core(factors) - core(start)) > 1
        assert_orthonormal(factors)


def test_a_random_start_is_the_base_in_a_seeded_subspace_of_its_own_for_each_layer() -> None:
    first, again, other = (FedSBRule().init(EMPTY, seed).adapters for seed in (1, 1, 2))
    for name, factors in first.items():
        assert factors.R is not None
        assert not factors.R.any()
        assert_orthonormal(factors)
        assert_same_bits(factors.tensors(), again[name].tensors())
        assert not torch.allclose(factors.A, other[name].A)
        assert not torch.allclose(factors.B, other[name].B)
    same = replace(EMPTY, modules={"c": MODULES["a"], "d": MODULES["a"]})
    c, d = FedSBRule().init(same, 1).adapters.values()
    assert not torch.allclose(c.A, d.A)
    assert not torch.allclose(c.B, d.B)


def test_an_empty_adapter_from_peft_is_no_start_but_a_fresh_run() -> None:
    """As `get_peft_model_state_dict` gives it: a drawn A and B = 0."""
    given = {
        n: LoraFactors(torch.ones(RANK, s.in_features), torch.zeros(s.out_features, RANK), SCALING)
        for n, s in MODULES.items()
    }
    ours, fresh = (FedSBRule().init(t, 1).adapters for t in (replace(EMPTY, adapters=given), EMPTY))
    for name, factors in fresh.items():
        assert_same_bits(ours[name].tensors(), factors.tensors())


# --- public ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("eta", [1e-4, 0.3])
def test_a_public_start_is_the_best_rank_r_of_the_first_step(scaling: float, eta: float) -> None:
    """Eckart-Young against NumPy's dense SVD of -eta sign(G), whatever the scaling."""
    G = gradients()
    rule = FedSBRule(subspace="public", eta=eta)
    state = rule.init(replace(EMPTY, scaling=scaling, gradients=G), 0)
    for name, factors in state.adapters.items():
        U, S, Vt = np.linalg.svd(-eta * np.sign(numpy(G[name])), full_matrices=False)
        best = (U[:, :RANK] * S[:RANK]) @ Vt[:RANK]
        assert relative(numpy(factors.delta()), best) < 1e-10
        assert relative(core(factors), np.diag(S[:RANK]) / scaling) < 1e-10
        assert_orthonormal(factors)


def test_a_public_start_needs_gradients_of_these_layers() -> None:
    rule = FedSBRule(subspace="public")
    with pytest.raises(ConfigError, match=r"^data\.public = ''"):
        rule.init(EMPTY, 0)
    with pytest.raises(FactorShapeError, match="lacks module b"):
        rule.init(replace(EMPTY, gradients={"a": gradients()["a"]}), 0)


@pytest.mark.parametrize(("subspace", "examples"), [("random", 0), ("private", 0), ("public", 7)])
def test_gradients_are_asked_for_where_they_are_used(subspace: str, examples: int) -> None:
    assert FedSBRule(subspace=subspace, public_examples=7).gradient_examples == examples


# --- private --------------------------------------------------------------------------------------------

PRIVATE = FedSBRule(subspace="private")


def test_a_private_subspace_is_trained_in_two_rounds_and_then_frozen() -> None:
    """Round 1 trains and ships B, round 2 A, every later one R; what is not trained keeps its bits."""
    states = rounds(PRIVATE, 5)
    assert [set(PRIVATE.trained(t)) for t in range(1, 6)] == [{"B"}, {"A"}, {"R"}, {"R"}, {"R"}]
    assert [PRIVATE.trained(t) == PRIVATE.shipped(t) for t in range(1, 6)] == [True] * 5
    assert [{f.R is None for f in s.adapters.values()} for s in states] == [{True}] * 2 + [{False}] * 4
    for name, third in states[2].adapters.items():
        last = states[5].adapters[name]
        assert_same_bits({"A": last.A, "B": last.B}, {"A": third.A, "B": third.B})
        assert_orthonormal(last)


def test_a_private_start_is_the_base_on_an_orthonormal_a() -> None:
    for factors in rounds(PRIVATE, 0)[0].adapters.values():
        assert not factors.B.any()
        assert np.abs(numpy(factors.A @ factors.A.T) - np.eye(RANK)).max() < 1e-6


def test_the_refactorings_keep_the_mean_product_and_the_columns_that_were_found() -> None:
    """After round 1 B is an orthonormal basis of the mean B; after round 2 s B R A is the product's SVD."""
    state = rounds(PRIVATE, 0)[0]
    for t in (1, 2):
        updates = FEDERATION.updates(PRIVATE, state)
        before, (state, diagnostics) = state, PRIVATE.aggregate(state, updates)
        assert diagnostics is not None
        assert diagnostics.gap < 1e-6
        for name, factors in state.adapters.items():
            _, clients = oracle_layer(before, updates, name)
            wanted = oracles.mean_update(clients)
            assert relative(effective(state)[name], wanted) < 1e-6
            B = numpy(factors.B)
            assert np.abs(B.T @ B - np.eye(RANK)).max() < 1e-6
            assert relative(B @ B.T @ wanted, wanted) < 1e-6
            if t == 2:
                S = np.linalg.svd(wanted, compute_uv=False)[:RANK]
                assert relative(core(factors), np.diag(S) / SCALING) < 1e-6


def test_a_layer_that_nobody_trains_gets_a_random_subspace() -> None:
    """Not the first axes, which is what a QR of zeros gives."""
    factors = rounds(PRIVATE, 2, FEW)[2].adapters["b"]
    assert not core(factors).any()
    assert_orthonormal(factors)
    assert float(factors.A[:, :RANK].abs().max()) < 0.95
    assert float(factors.B[:RANK].abs().max()) < 0.95


def test_momentum_of_the_sketch_does_not_reach_the_core() -> None:
    """It belongs to factors in a basis that is gone."""
    rule = make_rule("fed-sb", {"subspace": "private"}, optimizer=ServerOptimizer(name="fedavgm"))
    assert isinstance(rule, FedSBRule)
    states = rounds(rule, 4)
    assert [sorted(s.memory) for s in states[:3]] == [[], [], []]
    assert sorted(states[3].memory) == sorted(states[4].memory) == ["a/momentum/R", "b/momentum/R"]


# --- all ------------------------------------------------------------------------------------------------


@given(federation=federations(), subspace=st.sampled_from(["random", "private"]))
def test_a_given_adapter_is_kept_whatever_its_shape(federation: Federation, subspace: str) -> None:
    """Also where r exceeds out or in, over the rounds in which it is refactored."""
    rule = FedSBRule(subspace=subspace)
    federation = federation.suited(rule.facts)
    given, state = federation.template().adapters, federation.start(rule)
    assert given is not None
    for _ in range(3):
        for name, delta in effective(state).items():
            assert relative(delta, numpy(given[name].delta())) < 1e-10
        still = [
            replace(u, adapters=rule.broadcast(state, c).adapters)
            for u, c in zip(federation.updates(rule, state), federation.clients, strict=True)
        ]
        state, _ = rule.aggregate(state, still)
    for factors in state.adapters.values():
        R = core(factors)
        assert np.abs(R - np.diag(np.diag(R))).max() < 1e-10 * np.abs(R).max()


def test_a_reply_without_the_core_or_with_an_unwanted_one_is_refused() -> None:
    for rule, change in (
        (FedSBRule(), lambda f: replace(f, R=None)),
        (make_rule("ffa"), lambda f: replace(f, R=torch.eye(f.rank, dtype=f.A.dtype))),
    ):
        state = FEDERATION.start(rule)
        first, *others = FEDERATION.updates(rule, state)
        odd = replace(first, adapters={n: change(f) for n, f in first.adapters.items()})
        with pytest.raises(FactorShapeError, match=r"round 1, partition 0, a: the adapter has .*core R"):
            rule.aggregate(state, [odd, *others])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"subspace": "pissa"}, "subspace = 'pissa': accepted are random, private, public"),
        ({"public_examples": 0}, "public-examples = 0: must be >= 1"),
        ({"eta": 0.0}, "eta = 0.0: must be finite and > 0"),
        ({"eta": float("nan")}, "eta = nan: must be finite and > 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        FedSBRule(**options)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
