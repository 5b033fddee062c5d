"""FedRot-LoRA: rotations that keep every product, approach the reference, and undo the clients' own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from fedlora.core.factors import LoraFactors
from fedlora.core.state import ClientUpdate, State
from fedlora.errors import ConfigError
from strategies.registry import make_rule
from strategies.rules.fedrot import FedRotLoRARule, align, rotation, softened
from tests.oracles import best_rotation, soft_rotation
from tests.strategies.federations import Federation, effective, federations, numpy, one_layer, relative

LAMBDAS = (0.0, 0.2, 0.5, 0.8, 1.0, 1.5)
every_lambda = pytest.mark.parametrize("lam", LAMBDAS)
every_factor = pytest.mark.parametrize("to_a", [True, False], ids=["A", "B"])
HARD = make_rule("fedrot", {"lam": 1.0})


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(rank: int, seed: int) -> Tensor:
    """A random rotation: orthogonal, determinant 1."""
    Q, _ = torch.linalg.qr(normal(rank, rank, seed=seed))
    if torch.linalg.det(Q) < 0:
        Q[:, 0] *= -1
    return Q


SEEDS, RANKS = st.integers(0, 10**6), st.integers(1, 6)


@every_lambda
@every_factor
@given(seed=SEEDS, rank=RANKS, outs=st.integers(1, 9), ins=st.integers(1, 9))
def test_a_clients_product_is_kept(to_a: bool, lam: float, seed: int, rank: int, outs: int, ins: int) -> None:
    A, B = normal(rank, ins, seed=seed), normal(outs, rank, seed=seed + 1)
    reference = LoraFactors(normal(rank, ins, seed=seed + 2), normal(outs, rank, seed=seed + 3), 1.0)
    new_a, new_b = align(A, B, reference, lam, to_a=to_a)
    torch.testing.assert_close(new_b @ new_a, B @ A, rtol=0, atol=1e-12 * rank)
    torch.testing.assert_close(new_a.norm(), A.norm())


@every_factor
@given(seed=SEEDS, rank=RANKS, size=st.integers(1, 9))
def test_alignment_never_moves_away_from_the_reference(to_a: bool, seed: int, rank: int, size: int) -> None:
    """Nor does more of it: the distance falls as lam rises."""
    A, B = normal(rank, size, seed=seed), normal(size, rank, seed=seed + 1)
    reference = LoraFactors(normal(rank, size, seed=seed + 2), normal(size, rank, seed=seed + 3), 1.0)
    distances = [float((A - reference.A).norm() if to_a else (B - reference.B).norm())]
    for lam in LAMBDAS:
        new_a, new_b = align(A, B, reference, lam, to_a=to_a)
        distances.append(float((new_a - reference.A).norm() if to_a else (new_b - reference.B).norm()))
    assert distances[1] == pytest.approx(distances[0], abs=1e-10)
    assert all(later <= sooner + 1e-9 for sooner, later in pairwise(distances))


@given(seed=SEEDS, rank=st.integers(2, 5))
def test_no_other_rotation_comes_nearer(seed: int, rank: int) -> None:
    """Against rotations around the found one, and the papers' formula."""
    overlap = normal(rank, rank, seed=seed)
    R = rotation(overlap)
    assert float(torch.linalg.det(R)) == pytest.approx(1.0)
    best = float((R * overlap).sum())
    for i in range(20):
        skew = 10.0 ** -(i % 4) * normal(rank, rank, seed=seed + 1 + i)
        assert float((R @ torch.matrix_exp(skew - skew.T) * overlap).sum()) <= best + 1e-9
    assert np.allclose(numpy(R), best_rotation(numpy(overlap.T)), atol=1e-8)


@given(seed=SEEDS, rank=RANKS, lam=st.floats(0.0, 1.0))
def test_a_softened_rotation_is_a_rotation_between_the_identity_and_the_whole(
    seed: int, rank: int, lam: float
) -> None:
    R = turn(rank, seed)
    Q, identity = softened(R, lam), torch.eye(rank, dtype=R.dtype)
    torch.testing.assert_close(Q @ Q.T, identity, rtol=0, atol=1e-9)
    assert float((Q - identity).norm()) <= 2 * lam * float((R - identity).norm()) + 1e-9  # Lemma A.1
    assert np.allclose(numpy(Q), soft_rotation(numpy(R), lam), atol=1e-6)


@given(seed=SEEDS, rank=st.integers(2, 5), known=st.integers(0, 4))
def test_directions_that_the_reference_does_not_have_stay(seed: int, rank: int, known: int) -> None:
    """An overlap of lower rank, symmetric on what it knows: nothing has to be turned, so nothing is."""
    known = min(known, rank)
    half = normal(rank, known, seed=seed)
    assert torch.allclose(rotation(half @ half.T), torch.eye(rank, dtype=half.dtype), atol=1e-7)


def aligned(update: ClientUpdate, state: State, a: float, b: float) -> ClientUpdate:
    """``A_k = (I + a A A^T) A, B_k = B (I + b B^T B)``: no rotation brings them nearer to A or to B."""
    adapters = {
        name: LoraFactors(f.A + a * f.A @ f.A.T @ f.A, f.B + b * f.B @ f.B.T @ f.B, f.scaling)
        for name, f in state.adapters.items()
    }
    return replace(update, adapters=adapters)


@pytest.mark.parametrize("lam", [0.5, 1.0])
@pytest.mark.parametrize("server_round", [1, 2])
@given(federation=federations(min_clients=2, equal_scalings=True))
def test_clients_that_are_aligned_are_averaged_as_by_fedavg(
    lam: float, server_round: int, federation: Federation
) -> None:
    rule = make_rule("fedrot", {"lam": lam})
    federation = federation.suited(rule.facts)
    state = replace(federation.start(rule), round=server_round - 1)
    updates = [
        aligned(update, state, a=0.1 + 0.2 * i, b=0.9 - 0.2 * i)
        for i, update in enumerate(federation.updates(rule, state))
    ]
    mine, _ = rule.aggregate(state, updates)
    theirs, _ = make_rule("fedavg").aggregate(state, updates)
    for name, delta in effective(mine).items():
        assert relative(delta, effective(theirs)[name]) < 1e-7


def turned(update: ClientUpdate, seed: int) -> ClientUpdate:
    """The same client model in a basis of its own."""
    adapters = {}
    for name, f in update.adapters.items():
        Q = turn(f.rank, seed + update.partition_id)
        adapters[name] = LoraFactors(Q.T @ f.A, f.B @ Q, f.scaling)
    return replace(update, adapters=adapters)


@pytest.mark.parametrize("server_round", [1, 2])
@given(seed=SEEDS)
def test_the_clients_own_rotations_do_not_matter(server_round: int, seed: int) -> None:
    """At lam = 1; FedAvg of the same clients is another model."""
    federation = one_layer(seed)
    state = replace(federation.start(HARD), round=server_round - 1)
    updates = federation.updates(HARD, state)
    others = [turned(u, seed) for u in updates]
    after, again = (HARD.aggregate(state, given)[0] for given in (updates, others))
    assert relative(effective(again)["layer"], effective(after)["layer"]) < 1e-8
    plain, other = (make_rule("fedavg").aggregate(state, given)[0] for given in (updates, others))
    assert relative(effective(other)["layer"], effective(plain)["layer"]) > 1e-3


@given(seed=SEEDS)
def test_one_model_in_many_bases_is_that_model(seed: int) -> None:
    """Where FedAvg drops most of it."""
    federation = one_layer(seed)
    state = federation.start(HARD)
    one = federation.update(HARD, state, 0)
    same = [turned(replace(one, partition_id=i), seed) for i in range(3)]
    wanted = numpy(one.adapters["layer"].delta())
    after, diagnostics = HARD.aggregate(state, same)
    assert relative(effective(after)["layer"], wanted) < 1e-8
    assert diagnostics is not None
    assert diagnostics.gap < 1e-6


@given(federation=federations(min_clients=2))
def test_lambda_zero_is_fedavg(federation: Federation) -> None:
    rule = make_rule("fedrot", {"lam": 0.0})
    federation = federation.suited(rule.facts)
    state = federation.start(rule)
    updates = federation.updates(rule, state)
    mine, theirs = (r.aggregate(state, updates)[0] for r in (rule, make_rule("fedavg")))
    for name, f in mine.adapters.items():
        assert relative(numpy(f.A), numpy(theirs.adapters[name].A)) < 1e-12
        assert relative(numpy(f.B), numpy(theirs.adapters[name].B)) < 1e-12


@pytest.mark.parametrize("server_round", [1, 2])
def test_a_and_b_are_the_reference_in_turn(server_round: int) -> None:
    """NaN in the global factor that is not asked leaves the result alone."""
    federation = one_layer(0)
    state = replace(federation.start(HARD), round=server_round - 1)
    updates = federation.updates(HARD, state)
    silent = "A" if server_round == 1 else "B"
    f = state.adapters["layer"]
    blind = replace(state, adapters={"layer": replace(f, **{silent: getattr(f, silent) * torch.nan})})
    after, _ = HARD.aggregate(state, updates, diagnostics=False)
    other, _ = HARD.aggregate(blind, updates, diagnostics=False)
    assert torch.equal(other.adapters["layer"].A, after.adapters["layer"].A)


def test_the_first_round_of_a_fresh_adapter_is_fedavgs() -> None:
    """B = 0 is no reference; the rule for it is the identity."""
    federation = replace(one_layer(0), dtype=torch.float32)
    state = HARD.init(replace(federation.template(), adapters=None), seed=0)
    updates = federation.updates(HARD, state)
    mine, theirs = (r.aggregate(state, updates)[0] for r in (HARD, make_rule("fedavg")))
    assert relative(effective(mine)["layer"], effective(theirs)["layer"]) < 1e-6


@pytest.mark.parametrize("lam", [-0.1, float("nan"), float("inf")])
def test_an_impossible_lambda_is_refused(lam: float) -> None:
    with pytest.raises(ConfigError, match=r"^strategy.options lam = .*: must be in \[0, 1\], or above .*"):
        FedRotLoRARule(lam=lam)


# --- the released default -----------------------------------------------------------------------------------

RELEASED = make_rule("fedrot", {"lam": 1.5})
"""The authors' code with its default: lambda > 1 calls the alignment without a check of the determinant."""


def turned_over(update: ClientUpdate, seed: int) -> ClientUpdate:
    """The same client model in a basis of its own, of determinant -1."""
    adapters = {}
    for name, f in update.adapters.items():
        Q = turn(f.rank, seed + update.partition_id)
        Q[:, 0] *= -1
        adapters[name] = LoraFactors(Q.T @ f.A, f.B @ Q, f.scaling)
    return replace(update, adapters=adapters)


@pytest.mark.parametrize("server_round", [1, 2])
@given(seed=SEEDS)
def test_at_the_released_lambda_the_clients_own_reflections_do_not_matter(
    server_round: int, seed: int
) -> None:
    """Rotations alone cannot undo them."""
    federation = one_layer(seed)
    state = replace(federation.start(RELEASED), round=server_round - 1)
    updates = federation.updates(RELEASED, state)
    others = [turned_over(u, seed) for u in updates]
    after, again = (RELEASED.aggregate(state, given)[0] for given in (updates, others))
    assert relative(effective(again)["layer"], effective(after)["layer"]) < 1e-8
    proper, other = (HARD.aggregate(state, given)[0] for given in (updates, others))
    assert relative(effective(other)["layer"], effective(proper)["layer"]) > 1e-3


@every_factor
@given(seed=SEEDS, rank=RANKS, size=st.integers(6, 9))
def test_the_released_alignment_is_plain_procrustes(to_a: bool, seed: int, rank: int, size: int) -> None:
    """Against SciPy's, whatever the sign of the determinant."""
    A, B = normal(rank, size, seed=seed), normal(size, rank, seed=seed + 1)
    reference = LoraFactors(normal(rank, size, seed=seed + 2), normal(size, rank, seed=seed + 3), 1.0)
    mine = align(A, B, reference, 1.5, to_a=to_a)
    R, _ = orthogonal_procrustes(numpy(A.T if to_a else B), numpy(reference.A.T if to_a else reference.B))
    assert np.allclose(numpy(mine[0]), R.T @ numpy(A), atol=1e-8)
    assert np.allclose(numpy(mine[1]), numpy(B) @ R, atol=1e-8)
    assert all(torch.equal(f, g) for f, g in zip(mine, align(A, B, reference, 7.0, to_a=to_a), strict=True))
