"""FlexLoRA: what each client gets is the best of its rank, and what is lost is the tail of the spectrum."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.state import ClientSpec, ModuleSpec
from strategies.registry import make_rule
from strategies.rules.flexlora import FlexLoRARule
from tests import oracles
from tests.strategies.federations import (
    Federation,
    assert_same_bits,
    federations,
    numpy,
    oracle_layer,
    relative,
)

RULE = FlexLoRARule()


def spectra(federation: Federation) -> list[tuple[oracles.Array, oracles.Array]]:
    """T and its singular values, for each layer of the first round."""
    before = federation.start(RULE)
    updates = federation.updates(RULE, before)
    products = [oracles.mean_update(oracle_layer(before, updates, name)[1]) for name in before.adapters]
    return [(T, np.linalg.svd(T, compute_uv=False)) for T in products]


@given(federation=federations(), rank=st.integers(1, 4), alpha=st.sampled_from([1.0, 16.0]))
def test_a_client_starts_from_the_best_approximation_of_its_rank(
    federation: Federation, rank: int, alpha: float
) -> None:
    """``||s_i B_i A_i - T||^2 == sum_{j > r_i} sigma_j^2``, whatever its own scaling."""
    before = federation.start(RULE)
    after, _ = RULE.aggregate(before, federation.updates(RULE, before))
    rank = min(rank, federation.rank)
    given = RULE.broadcast(after, ClientSpec(partition_id=7, rank=rank, scaling=alpha / rank))
    for factors, (T, sigma) in zip(given.adapters.values(), spectra(federation), strict=True):
        assert factors.rank == rank
        error = float(np.linalg.norm(numpy(factors.delta()) - T))
        assert error == pytest.approx(float(np.linalg.norm(sigma[rank:])), abs=1e-10 * (1 + sigma[0]))


@given(federation=federations(), low=st.integers(1, 4))
def test_starts_are_nested(federation: Federation, low: int) -> None:
    """The adapter of a lower rank is the leading part of a higher one, bit for bit."""
    before = federation.start(RULE)
    after, _ = RULE.aggregate(before, federation.updates(RULE, before))
    low = min(low, federation.rank)
    specs = [ClientSpec(partition_id=0, rank=r, scaling=2.0) for r in (low, federation.rank)]
    small, large = (RULE.broadcast(after, spec).adapters for spec in specs)
    for name, factors in small.items():
        leading = {"A": large[name].A[:low], "B": large[name].B[:, :low]}
        assert_same_bits({"A": factors.A, "B": factors.B}, leading)


@given(federation=federations())
def test_the_energy_lost_is_the_tail_of_the_spectrum(federation: Federation) -> None:
    """``sum_{j > r} sigma_j^2 / sum_j sigma_j^2`` over all layers."""
    before = federation.start(RULE)
    _, diagnostics = RULE.aggregate(before, federation.updates(RULE, before))
    assert diagnostics is not None
    found = [sigma for _, sigma in spectra(federation)]
    lost = sum(float((sigma[federation.rank :] ** 2).sum()) for sigma in found)
    energy = sum(float((sigma**2).sum()) for sigma in found)
    assert diagnostics.energy_lost == pytest.approx(lost / energy, rel=1e-6, abs=1e-12)


@given(federation=federations(min_clients=2))
def test_where_the_rank_suffices_it_is_exact(federation: Federation) -> None:
    federation = replace(federation, rank=max(m.out_features for m in federation.modules.values()))
    before = federation.start(RULE)
    updates = federation.updates(RULE, before)
    after, diagnostics = RULE.aggregate(before, updates)
    assert diagnostics is not None
    assert diagnostics.energy_lost < 1e-12
    for name, factors in after.adapters.items():
        T = oracles.mean_update(oracle_layer(before, updates, name)[1])
        assert relative(numpy(factors.delta()), T) < 1e-10


def _few() -> Federation:
    """Global rank 6, but the clients of this round have rank 1 and 2: T lacks three directions."""
    return Federation(
        modules={"layer": ModuleSpec(out_features=9, in_features=12)},
        rank=6,
        scaling=2.0,
        clients=tuple(ClientSpec(partition_id=i, rank=i + 1, scaling=1.0) for i in range(2)),
        weights=(1.0, 2.0),
        seed=5,
    )


@pytest.mark.parametrize("name", ["flexlora", "fedmomentum"])
def test_every_direction_of_the_next_adapter_can_be_trained(name: str) -> None:
    """One gradient step from it moves the product in all r directions: none has A = 0 and B = 0."""
    rule, federation = make_rule(name), _few()
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, _ = rule.aggregate(before, updates)
    factors = after.adapters["layer"]
    assert not factors.B[:, 3:].any()
    assert np.abs(numpy(factors.A @ factors.A.T) - np.eye(6)).max() < 1e-12
    start = before.adapters["layer"].A
    inside = torch.linalg.lstsq(torch.cat([factors.A[:3], start]).T, factors.A[3:].T)
    assert float(inside.residuals.sum()) < 1e-20  # from the start's A, nothing is drawn
    B = factors.B.clone().requires_grad_()
    (factors.scaling * B @ factors.A - federation.normal((9, 12), "label")).square().sum().backward()
    assert B.grad is not None
    assert (B.grad.abs().sum(dim=0) > 1e-3).all()


@pytest.mark.parametrize("name", ["flexlora", "fedmomentum"])
def test_clients_that_agree_leave_no_direction_to_chance(name: str) -> None:
    """T of rank 1 out of a stack of rank 3: the other singular vectors are rounding and do not show."""
    rule, federation = make_rule(name), _few()
    before = federation.start(rule)
    one = federation.updates(rule, before)[0]
    twin = replace(one, partition_id=9, adapters={
        n: replace(f, A=-0.5 * f.A, B=-2.0 * f.B) for n, f in one.adapters.items()
    })  # fmt: skip
    after, _ = rule.aggregate(before, [one, twin, replace(one, partition_id=11)])
    assert len(after.base) == 0
    factors = after.adapters["layer"]
    assert not factors.B[:, 1:].any()
    assert np.abs(numpy(factors.A @ factors.A.T) - np.eye(6)).max() < 1e-12
