"""LoRA-FAIR's correction: the minimiser that the paper asks for, its variants, bounds and limits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fedlora.core.factors import AdapterSet, LoraFactors, Product
from fedlora.errors import ConfigError
from strategies.registry import make_rule
from strategies.rules.fair_solver import cosine_correction, ridge_correction
from strategies.rules.lora_fair import LoRAFAIRRule
from tests.oracles import Array, cosine, fair_correction, fair_gradient, fair_objective, mean_update
from tests.strategies.federations import (
    Federation,
    effective,
    federations,
    numpy,
    one_layer,
    oracle_layer,
    relative,
)

LAMBDAS = (0.0, 1e-3, 0.01, 0.1, 1.0, 30.0)


@dataclass(frozen=True)
class Problem:
    """Averages A (r, in), B (out, r) and the mean product T (out, in) of clients around a common start."""

    A: Array
    B: Array
    T: Array

    def solved(self, lam: float, norm: str = "squared") -> Array:
        """The rule's dB, from the stacked T."""
        A, B, target = self._stacked()
        return numpy(cosine_correction(A, B, target, lam, squared=norm == "squared"))

    def ridge(self, lam: float) -> Array:
        """The dB of the closed form."""
        return numpy(ridge_correction(*self._stacked(), lam))

    def _stacked(self) -> tuple[torch.Tensor, torch.Tensor, Product]:
        rank = min(self.T.shape)
        U, S, Vt = np.linalg.svd(self.T, full_matrices=False)
        target = Product(torch.from_numpy(U[:, :rank] * S), torch.from_numpy(Vt))
        return torch.from_numpy(self.A), torch.from_numpy(self.B), target

    def cosine(self, dB: Array) -> float:
        return cosine(self.T, (self.B + dB) @ self.A)


@st.composite
def problems(draw: st.DrawFn, drift: float = 1.0, size: float = 1.0) -> Problem:
    """Two to four clients that drifted from one start; ``size`` is the typical entry of B."""
    out_features, in_features = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    rank, m = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    A_k = random.normal(size=(rank, in_features)) + drift * random.normal(size=(m, rank, in_features))
    B_k = random.normal(size=(out_features, rank)) + drift * random.normal(size=(m, out_features, rank))
    p, B_k = random.dirichlet(np.full(m, 3.0)), size * B_k
    T = np.einsum("k,kor,kri->oi", p, B_k, A_k)
    return Problem(np.einsum("k,kri->ri", p, A_k), np.einsum("k,kor->or", p, B_k), T)


every_norm = pytest.mark.parametrize("norm", ["squared", "plain"])


@every_norm
@pytest.mark.parametrize("lam", [1e-3, 0.01, 1.0])
@given(problem=problems())
def test_small_space_equals_the_dense_problem(problem: Problem, lam: float, norm: str) -> None:
    """2q x q unknowns after two QRs find the same dB as all out x r of them."""
    dense = fair_correction(problem.A, problem.B, problem.T, lam, norm)
    given = problem.solved(lam, norm)
    assert np.linalg.norm(given - dense) < 1e-6 * np.linalg.norm(problem.B)


@pytest.mark.parametrize("lam", [0.01, 1.0])
@given(problem=problems(drift=0.3, size=1e-3))
def test_and_so_it_does_at_the_size_of_a_trained_b(problem: Problem, lam: float) -> None:
    """At ||B|| = 1e-3 the penalty is 1e-6 of the cosine, yet it alone decides how long B' is."""
    dense = fair_correction(problem.A, problem.B, problem.T, lam)
    given = problem.solved(lam)
    assert np.linalg.norm(given - dense) < 1e-5 * np.linalg.norm(problem.B)


@every_norm
@pytest.mark.parametrize("lam", LAMBDAS)
@given(problem=problems())
def test_the_cosine_rises_up_to_its_bound(problem: Problem, lam: float, norm: str) -> None:
    """Not above ||T V|| / ||T|| with V the row space of A: nothing else of T can be repaired."""
    after = problem.cosine(problem.solved(lam, norm))
    V = np.linalg.svd(problem.A, full_matrices=False)[2].T
    bound = float(np.linalg.norm(problem.T @ V) / np.linalg.norm(problem.T))
    assert problem.cosine(0 * problem.B) - 1e-9 <= after <= bound + 1e-9


@given(problem=problems(drift=0.3))
def test_without_penalty_the_bound_is_reached_at_the_nearest_length(problem: Problem) -> None:
    """At lam = 0: the best direction, and of its multiples the one nearest to the plain average."""
    U, S, Vt = np.linalg.svd(problem.A, full_matrices=False)
    assume(S[-1] > 0.05 * S[0])
    dB = problem.solved(0.0)
    bound = float(np.linalg.norm(problem.T @ Vt.T) / np.linalg.norm(problem.T))
    assert problem.cosine(dB) > bound - 1e-8
    corrected, average = (problem.B + dB) @ U, problem.B @ U
    assert abs(float(((average - corrected) * corrected).sum())) < 1e-6 * float((average**2).sum())


@every_norm
@given(problem=problems())
def test_it_is_monotone_in_lambda_and_vanishes_for_a_large_one(problem: Problem, norm: str) -> None:
    """A larger lam moves B less and raises the cosine less; lam -> infinity is FedAvg."""
    lams = (0.01, 0.1, 1.0, 10.0, 1e3, 1e6)
    solutions = [problem.solved(lam, norm) for lam in lams]
    for lam, dB in zip(lams, solutions, strict=True):
        values = [
            fair_objective(problem.A, problem.B, problem.T, lam, other, norm) for other in [dB, *solutions]
        ]
        assume(values[0] <= min(values) + 1e-9)  # a merely local minimum promises nothing
    sizes = [float(np.linalg.norm(dB)) for dB in solutions]
    cosines = [problem.cosine(dB) for dB in solutions]
    assert all(a >= b - 1e-6 for a, b in pairwise(sizes))
    assert all(a >= b - 1e-6 for a, b in pairwise(cosines))
    assert sizes[-1] < 1e-4 * np.linalg.norm(problem.B)


@given(problem=problems(), factor=st.sampled_from([1e-4, 0.03, 7.0, 1e4]))
def test_scaling_all_b_scales_the_correction(problem: Problem, factor: float) -> None:
    """The cosine does not see it; with lam / factor^2 neither does the penalty."""
    scaled = Problem(problem.A, factor * problem.B, factor * problem.T)
    for lam in (0.0, 0.1):
        dB, expected = scaled.solved(lam / factor**2), problem.solved(lam)
        assert np.linalg.norm(dB / factor - expected) < 1e-6 * np.linalg.norm(problem.B)


# --- the plain norm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.01, 2.0, 50.0])
@given(problem=problems(drift=0.3))
def test_the_plain_norm_has_a_dead_zone(problem: Problem, share: float) -> None:
    """Nothing is corrected where lam reaches the length of the cosine's gradient; squared, there is none."""
    steepness = float(np.linalg.norm(fair_gradient(problem.A, problem.B, problem.T)))
    assume(steepness > 1e-3 / np.linalg.norm(problem.B))
    assume(np.linalg.svd(problem.A, compute_uv=False)[-1] > 1e-3)
    lam = share * steepness
    moved = float(np.linalg.norm(problem.solved(lam, "plain")))
    assert (moved == 0.0) == (share > 1)
    assert float(np.linalg.norm(problem.solved(lam))) > 0


@pytest.mark.parametrize("share", [0.3, 1.0])
@given(problem=problems(drift=0.3), seed=st.integers(0, 1000))
def test_no_small_step_is_better_than_the_plain_solution(problem: Problem, share: float, seed: int) -> None:
    """Neither in the dead zone nor outside: the objective rises in every direction."""
    lam = share * float(np.linalg.norm(fair_gradient(problem.A, problem.B, problem.T)))
    found = problem.solved(lam, "plain")

    def value(dB: Array) -> float:
        return fair_objective(problem.A, problem.B, problem.T, lam, dB, "plain")

    random = np.random.default_rng(seed)
    for size in (1e-4, 1e-2):
        step = random.normal(size=problem.B.shape)
        step *= size * np.linalg.norm(problem.B) / np.linalg.norm(step)
        assert value(found + step) >= value(found) - 1e-10


@given(problem=problems(drift=0.3))
def test_without_penalty_both_norms_are_one(problem: Problem) -> None:
    assume(np.linalg.svd(problem.A, compute_uv=False)[-1] > 0.05)
    squared, plain = problem.solved(0.0), problem.solved(0.0, "plain")
    assert np.linalg.norm(squared - plain) < 1e-5 * np.linalg.norm(problem.B)


# --- least squares -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [1e-3, 0.1, 10.0])
@given(problem=problems())
def test_ridge_minimises_the_dense_least_squares(problem: Problem, lam: float) -> None:
    """Against NumPy's least squares on the stacked system ``[A^T; sqrt(lam) I] dB^T = [(T - B A)^T; 0]``."""
    rank = problem.A.shape[0]
    system = np.vstack([problem.A.T, np.sqrt(lam) * np.eye(rank)])
    missing = (problem.T - problem.B @ problem.A).T
    wanted = np.linalg.lstsq(system, np.vstack([missing, np.zeros((rank, problem.B.shape[0]))]))[0].T
    assert np.linalg.norm(problem.ridge(lam) - wanted) < 1e-8 * (1 + np.linalg.norm(wanted))


@given(problem=problems())
def test_ridge_is_the_projection_without_penalty_and_fedavg_with_a_large_one(problem: Problem) -> None:
    """``B' A = T V V^T`` as lam -> 0, the best that A's row space can hold, in length too."""
    V = np.linalg.svd(problem.A, full_matrices=False)[2]
    assume(np.linalg.svd(problem.A, compute_uv=False)[-1] > 0.05)
    best = problem.T @ V.T @ V
    assert np.linalg.norm((problem.B + problem.ridge(0.0)) @ problem.A - best) < 1e-8 * np.linalg.norm(best)
    sizes = [float(np.linalg.norm(problem.ridge(lam))) for lam in (0.0, 0.01, 1.0, 100.0, 1e9)]
    assert all(a >= b - 1e-12 for a, b in pairwise(sizes))
    assert sizes[-1] < 1e-6 * (1 + np.linalg.norm(problem.T))


# --- which factor --------------------------------------------------------------------------------------

SOLVERS = [{"lam": 0.01}, {"lam": 0.01, "norm": "plain"}, {"lam": 0.01, "solver": "ridge"}]
every_solver = pytest.mark.parametrize("options", SOLVERS, ids=["squared", "plain", "ridge"])


@every_solver
@given(federation=federations(min_clients=2))
def test_correcting_a_is_correcting_b_of_the_transposed_layers(
    options: dict[str, object], federation: Federation
) -> None:
    federation = federation.suited(make_rule("lora-fair").facts)
    scaled = tuple(replace(c, scaling=federation.scaling) for c in federation.clients)
    federation = replace(federation, clients=scaled)  # B carries unequal scalings
    rule = make_rule("lora-fair", {**options, "correct": "A"})
    before = federation.start(rule)
    updates = federation.updates(rule, before)
    after, _ = rule.aggregate(before, updates)
    flipped, _ = make_rule("lora-fair", options).aggregate(
        replace(before, adapters=_transposed(before.adapters)),
        [replace(u, adapters=_transposed(u.adapters)) for u in updates],
    )
    for name, f in _transposed(flipped.adapters).items():
        assert relative(numpy(after.adapters[name].A), numpy(f.A)) < 1e-6
        assert relative(numpy(after.adapters[name].B), numpy(f.B)) < 1e-12


def _transposed(adapters: AdapterSet) -> AdapterSet:
    return {n: LoraFactors(f.B.T.contiguous(), f.A.T.contiguous(), f.scaling) for n, f in adapters.items()}


@every_solver
@pytest.mark.parametrize("seed", range(4))
def test_each_correction_of_both_comes_nearer_to_what_the_clients_ask_for(
    options: dict[str, object], seed: int
) -> None:
    """None, B alone, A against the corrected B: the cosine rises each time, for ridge the error falls."""
    federation = one_layer(seed)
    rules = [make_rule("fedavg"), *(make_rule("lora-fair", {**options, "correct": c}) for c in ("B", "both"))]
    before = federation.start(rules[0])
    updates = federation.updates(rules[0], before)
    target = mean_update(oracle_layer(before, updates, "layer")[1])
    deltas = [effective(rule.aggregate(before, updates)[0])["layer"] for rule in rules]
    if options.get("solver") == "ridge":
        nearness = [-float(np.linalg.norm(target - delta)) for delta in deltas]
    else:
        nearness = [cosine(target, delta) for delta in deltas]
    assert nearness[0] + 1e-3 < nearness[1] < nearness[2] - 1e-4


@every_solver
@given(federation=federations(min_clients=2))
def test_clients_that_share_a_are_averaged_exactly(
    options: dict[str, object], federation: Federation
) -> None:
    """Equal A_k: the plain average is already T, so nothing is corrected."""
    rule = make_rule("lora-fair", options)
    federation = federation.suited(rule.facts)
    before = federation.start(rule)
    shared = [
        replace(u, adapters={n: replace(f, A=before.adapters[n].A) for n, f in u.adapters.items()})
        for u in federation.updates(rule, before)
    ]
    after, diagnostics = rule.aggregate(before, shared)
    plain, _ = make_rule("fedavg").aggregate(before, shared)
    assert diagnostics.gap < 1e-6
    for name, delta in effective(after).items():
        assert relative(delta, effective(plain)[name]) < 1e-6


EYE = torch.eye(4, dtype=torch.float64)


@every_norm
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize(
    ("A", "B", "T"),
    [
        (EYE[:2], torch.zeros(3, 2), torch.ones(3, 4)),
        (torch.zeros(2, 4), torch.ones(3, 2), torch.ones(3, 4)),
        (EYE[:2], torch.ones(3, 2), torch.zeros(3, 4)),
        (EYE[:2], torch.ones(3, 2), torch.ones(3, 1) * EYE[3]),
        (EYE[:2], torch.ones(3, 2), -torch.ones(3, 2).double() @ EYE[:2]),
        (EYE[[0, 0]], torch.tensor([[1.0, -1.0]] * 3), torch.ones(3, 4)),
    ],
    ids=["B = 0", "A = 0", "T = 0", "T outside A", "T opposite", "B A = 0 by a rank-deficient A"],
)
def test_where_there_is_nothing_to_point_at_b_stays(
    A: torch.Tensor, B: torch.Tensor, T: torch.Tensor, lam: float, norm: str
) -> None:
    dB = cosine_correction(A.double(), B.double(), Product(T.double(), EYE), lam, squared=norm == "squared")
    assert dB.shape == B.shape
    assert float(dB.norm()) < 1e-6


@pytest.mark.parametrize("lam", LAMBDAS)
@given(problem=problems(), weak=st.sampled_from([0.0, 1e-12]))
def test_a_rank_deficient_a_is_corrected_where_it_reaches(problem: Problem, lam: float, weak: float) -> None:
    """A repeated row, exact or within rounding, gives a finite correction that raises the cosine."""
    rows = np.vstack([problem.A[:1]] * problem.A.shape[0])
    noise = np.random.default_rng(0).normal(size=rows.shape)
    flat = replace(problem, A=rows + weak * noise)
    assume(float(np.linalg.norm(flat.B @ flat.A)) > 1e-3)
    dB = flat.solved(lam)
    assert np.isfinite(dB).all()
    assert flat.cosine(dB) >= flat.cosine(0 * dB) - 1e-9


@pytest.mark.parametrize("lam", LAMBDAS)
def test_a_direction_of_a_that_is_rounding_is_left_alone(lam: float) -> None:
    """Its column of B would have to grow without bound to point anywhere."""
    A = EYE[:2] * torch.tensor([[1.0], [1e-7]], dtype=EYE.dtype)
    B = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 1.0]], dtype=EYE.dtype)
    T = torch.tensor([[1.0, 5.0], [2.0, 4.0], [0.0, -3.0]], dtype=EYE.dtype) @ EYE[:2]
    dB = cosine_correction(A, B, Product(T, EYE), lam)
    assert float(dB[:, 0].norm()) > 1e-4
    assert float(dB[:, 1].norm()) < 1e-12


@pytest.mark.parametrize("lam", [-0.1, float("nan"), float("inf")])
def test_an_impossible_lambda_is_refused(lam: float) -> None:
    with pytest.raises(ConfigError, match=r"^strategy.options lam = .*: must be finite and >= 0$"):
        LoRAFAIRRule(lam=lam)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"norm": "l1"}, "norm = 'l1': accepted are squared, plain"),
        ({"solver": "exact"}, "solver = 'exact': accepted are cosine, ridge"),
        ({"correct": "b"}, "correct = 'b': accepted are B, A, both"),
        ({"norm": "plain", "solver": "ridge"}, "norm = 'plain': solver = 'ridge' accepts only squared"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_rule("lora-fair", options)
    assert str(error.value) == f"strategy.options {named}"
