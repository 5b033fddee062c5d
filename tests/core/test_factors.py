"""Products that are never multiplied out, against NumPy's dense matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedlora.core.decompositions import compact_svd, completed, split, svd, truncate
from fedlora.core.factors import (
    LoraFactors,
    Product,
    add,
    as_product,
    check_same_modules,
    inner,
    norm,
    resize,
    scale,
    stack,
)
from fedlora.errors import FactorShapeError

Array = NDArray[np.float64]
SCALINGS = st.sampled_from([0.25, 1.0, 2.0, 16.0])


def tensor(random: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.normal(size=shape))


def dense(p: Product) -> Array:
    return np.asarray(p.left.double().numpy() @ p.right.double().numpy())


@dataclass(frozen=True)
class Case:
    """Two products of one (out, in) shape; R below, at and above min(out, in)."""

    p: Product
    q: Product

    @property
    def bound(self) -> int:
        return min(self.p.rank_bound, self.p.left.shape[0], self.p.right.shape[1])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    out_features, in_features = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    p, q = (
        Product(tensor(random, out_features, R), tensor(random, R, in_features))
        for R in (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    )
    return Case(p, q)


@st.composite
def adapters(draw: st.DrawFn, number: int = 1) -> Sequence[LoraFactors]:
    out_features, in_features = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    ranks = [draw(st.integers(1, 5)) for _ in range(number)]
    return [
        LoraFactors(tensor(random, r, in_features), tensor(random, out_features, r), draw(SCALINGS))
        for r in ranks
    ]


@given(terms=adapters(number=3), weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_a_stack_is_the_weighted_sum_of_deltas(terms: Sequence[LoraFactors], weights: list[float]) -> None:
    product = stack(zip(weights, terms, strict=True))
    expected = sum(w * f.scaling * (f.B @ f.A).numpy() for w, f in zip(weights, terms, strict=True))
    assert np.allclose(dense(product), expected, atol=1e-12)
    assert np.allclose(product.dense().numpy(), expected, atol=1e-12)
    assert product.rank_bound == sum(f.rank for f in terms)
    assert product.nbytes == product.left.nbytes + product.right.nbytes


@given(case=cases(), factor=st.floats(-3, 3))
def test_sums_multiples_norms_and_inner_products(case: Case, factor: float) -> None:
    p, q, P, Q = case.p, case.q, dense(case.p), dense(case.q)
    size = float(np.linalg.norm(P) * np.linalg.norm(Q)) + 1.0
    assert np.allclose(dense(add(p, q)), P + Q, atol=1e-12)
    assert np.allclose(dense(add(p, q, p)), P + Q + P, atol=1e-12)
    assert np.allclose(dense(scale(factor, p)), factor * P, atol=1e-12)
    assert abs(inner(p, q) - float((P * Q).sum())) < 1e-12 * size
    assert abs(norm(p) - float(np.linalg.norm(P))) < 1e-7 * size


@given(case=cases())
def test_a_difference_of_equals_has_norm_zero_within_the_stated_error(case: Case) -> None:
    """Gram matrices square the numbers, so half of float64's digits are left: 1e-7 of the terms."""
    terms = float(case.p.left.norm() * case.p.right.norm())
    assert norm(add(case.p, scale(-1.0, case.p))) < 1e-7 * terms


@given(case=cases())
def test_the_svd_is_numpys(case: Case) -> None:
    """Both ways, the QR core and the small dense matrix: same singular values, orthonormal vectors."""
    U, S, Vh = (t.numpy() for t in svd(case.p))
    P = dense(case.p)
    expected = np.linalg.svd(P, compute_uv=False)
    q = S.size
    assert q == case.bound
    assert np.abs(U * S @ Vh - P).max() < 1e-11 * expected[0]
    assert np.abs(S - expected[:q]).max() < 1e-11 * expected[0]
    assert np.all(np.diff(S) <= 0)
    assert np.abs(U.T @ U - np.eye(q)).max() < 1e-11
    assert np.abs(Vh @ Vh.T - np.eye(q)).max() < 1e-11


@given(case=cases())
def test_the_signs_of_the_svd_are_fixed_by_the_product(case: Case) -> None:
    """Largest entry of each right vector positive; (-L)(-R) is the same product with the same vectors."""
    U, S, Vh = svd(case.p)
    assert (Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)) > 0).all()
    assume(float((S - torch.cat([S[1:], S.new_zeros(1)])).min()) > 1e-3 * float(S[0]))
    for one, two in zip((U, S, Vh), svd(Product(-case.p.left, -case.p.right)), strict=True):
        assert torch.allclose(one, two, atol=1e-8)


@given(case=cases(), rank=st.integers(1, 12), scaling=SCALINGS)
def test_truncation_is_the_best_approximation(case: Case, rank: int, scaling: float) -> None:
    """Eckart-Young: the error is sqrt(sum_{j > r} sigma_j^2); A has orthonormal rows, the rest is zero."""
    factors = truncate(case.p, rank, scaling)
    P = dense(case.p)
    sigma = np.linalg.svd(P, compute_uv=False)
    error = float(np.linalg.norm(factors.delta().numpy() - P))
    assert abs(error - float(np.linalg.norm(sigma[rank:]))) < 1e-10 * sigma[0]
    assert (factors.rank, factors.scaling) == (rank, scaling)
    q = min(rank, case.bound)
    gram = (factors.A @ factors.A.T).numpy()
    assert np.abs(gram - np.diag([1.0] * q + [0.0] * (rank - q))).max() < 1e-11
    assert not factors.B[:, q:].any()


@given(case=cases(), rank=st.integers(1, 5), more=st.integers(1, 5))
def test_truncations_are_nested(case: Case, rank: int, more: int) -> None:
    """The rank-r adapter is the leading part of the rank-(r + more) one, bit for bit."""
    small, large = truncate(case.p, rank, 2.0), truncate(case.p, rank + more, 2.0)
    leading = resize(large, rank, 2.0)
    assert torch.equal(leading.A, small.A)
    assert torch.equal(leading.B, small.B)


def _of_rank(case: Case, rank: int) -> Product:
    """A product of at most that rank whose factors do not show it: each half of R cancels or repeats."""
    left, right = case.p.left[:, :rank], case.p.right[:rank]
    return Product(torch.cat([left, 2 * left, -left], dim=1), torch.cat([right, right, 0.5 * right]))


@given(case=cases(), rank=st.integers(0, 4))
def test_a_compact_svd_has_the_rank_of_the_product(case: Case, rank: int) -> None:
    p = _of_rank(case, rank)
    U, S, Vh = compact_svd(p)
    assert S.numel() == min(rank, case.bound)
    assert U.shape[1] == Vh.shape[0] == S.numel()
    assert torch.allclose((U * S) @ Vh, p.dense(), atol=1e-11)


@given(case=cases(), rank=st.integers(1, 12), scaling=SCALINGS)
def test_a_product_is_its_best_adapter_and_the_rest(case: Case, rank: int, scaling: float) -> None:
    """Nothing is lost, nothing counts twice, and the rest has no more columns than directions."""
    best, rest = split(case.p, rank, scaling)
    expected = truncate(case.p, rank, scaling)
    assert torch.equal(best.A, expected.A)
    assert torch.equal(best.B, expected.B)
    assert rest.rank_bound == max(0, case.bound - rank)
    assert np.allclose(best.delta().numpy() + dense(rest), dense(case.p), atol=1e-11)
    if rest.rank_bound:
        assert np.abs((best.A @ rest.right.T).numpy()).max() < 1e-9


@pytest.mark.parametrize("kind", ["another basis", "one start"])
def test_the_svd_of_ill_conditioned_float32_factors_is_that_of_their_product(kind: str) -> None:
    """Condition 1e6: factors in a bad basis, and clients that moved little from a common A.

    A QR in float32 misses the first product by 1e-2, and the second one's small directions altogether.
    """
    random = np.random.default_rng(0)
    left, right = tensor(random, 60, 24), tensor(random, 24, 50)
    if kind == "another basis":
        Q, P = (torch.linalg.qr(tensor(random, 24, 24))[0] for _ in range(2))
        G = Q * torch.logspace(0, -6, 24, dtype=torch.float64) @ P
        left, right = left @ G, torch.linalg.solve(G, right)
    else:
        right = tensor(random, 6, 50).repeat(4, 1) + 1e-6 * right
    p = Product(left.float(), right.float())
    exact = dense(p)
    U, S, Vh = (t.double().numpy() for t in svd(p))
    sigma = np.linalg.svd(exact, compute_uv=False)[:24]
    assert np.abs(S / sigma - 1).max() < 1e-5
    assert np.linalg.norm(U * S @ Vh - exact) < 1e-5 * np.linalg.norm(exact)
    assert np.abs(U.T @ U - np.eye(24)).max() < 1e-6
    assert np.abs(Vh @ Vh.T - np.eye(24)).max() < 1e-6


# --- directions that a client could not train --------------------------------------------------------


def _start(random: np.random.Generator, rows: int, in_features: int, inside: torch.Tensor) -> torch.Tensor:
    """Spare rows of which the first lies in the given row space (its own direction is none)."""
    spare = tensor(random, rows, in_features)
    if inside.shape[0]:
        spare[0] = tensor(random, 1, inside.shape[0]) @ inside
    return spare


@given(case=cases(), rank=st.integers(1, 12), directions=st.integers(0, 4), seed=st.integers(0, 99))
def test_completing_leaves_no_dead_direction_and_the_product_alone(
    case: Case, rank: int, directions: int, seed: int
) -> None:
    """Orthonormal rows everywhere, as many as the inputs have room for; B and what counts of A keep bits."""
    best, _ = split(_of_rank(case, directions), rank, 2.0)
    live = min(rank, directions, case.bound)
    random = np.random.default_rng(seed)
    spare = _start(random, rank, best.in_features, best.A[:live])
    full = completed(best, spare, torch.Generator().manual_seed(seed))
    room = min(rank, best.in_features)
    gram = (full.A @ full.A.T).numpy()
    assert np.abs(gram - np.diag([1.0] * room + [0.0] * (rank - room))).max() < 1e-9
    assert torch.equal(full.B, best.B)
    assert torch.equal(full.A[:live], best.A[:live])
    assert torch.equal(full.delta(), best.delta())


def test_spare_rows_come_first_and_draws_only_where_they_depend() -> None:
    """The same draws whatever the seed where spare rows suffice; other ones where they do not."""
    random = np.random.default_rng(1)
    best, _ = split(Product(tensor(random, 9, 2), tensor(random, 2, 12)), 4, 1.0)
    spare = tensor(random, 4, 12)

    def rows(offered: torch.Tensor, seed: int) -> torch.Tensor:
        return completed(best, offered, torch.Generator().manual_seed(seed)).A

    assert torch.equal(rows(spare, 0), rows(spare, 1))
    residual = spare[:2] - spare[:2] @ best.A[:2].T @ best.A[:2]
    assert np.linalg.matrix_rank(torch.cat([residual, rows(spare, 0)[2:]]).numpy(), tol=1e-9) == 2
    for dependent in (torch.zeros(4, 12).double(), best.A[:2].repeat(2, 1), spare[:1].repeat(4, 1)):
        assert torch.equal(rows(dependent, 0), rows(dependent, 0))
        assert not torch.allclose(rows(dependent, 0)[3], rows(dependent, 1)[3], atol=1e-3)


@given(drawn=adapters(), rank=st.integers(1, 8), scaling=SCALINGS)
def test_resizing_keeps_the_leading_part(drawn: Sequence[LoraFactors], rank: int, scaling: float) -> None:
    """The product of the leading rows and columns at the old scaling; all of it where rank suffices."""
    (factors,) = drawn
    resized = resize(factors, rank, scaling)
    expected = factors.scaling * (factors.B[:, :rank] @ factors.A[:rank])
    assert (resized.rank, resized.scaling) == (rank, scaling)
    assert torch.allclose(resized.delta(), expected, atol=1e-12)
    if rank >= factors.rank:
        assert torch.allclose(resized.delta(), factors.delta(), atol=1e-12)
        assert not resized.A[factors.rank :].any()


@given(drawn=adapters())
def test_an_adapter_is_its_own_product(drawn: Sequence[LoraFactors]) -> None:
    (factors,) = drawn
    assert torch.allclose(as_product(factors).dense(), factors.delta(), atol=1e-12)
    assert factors.B.shape == (factors.out_features, factors.rank)
    assert factors.A.shape == (factors.rank, factors.in_features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("R", [2, 9])
def test_dtype_is_kept(dtype: torch.dtype, R: int) -> None:
    random = np.random.default_rng(0)
    p = Product(tensor(random, 6, R).to(dtype), tensor(random, R, 5).to(dtype))
    f = truncate(p, 3, 2.0)
    everything = [*svd(p), f.A, f.B, resize(f, 4, 1.0).A, as_product(f).right, scale(2.0, p).right]
    assert {t.dtype for t in everything} == {dtype}


@pytest.mark.parametrize(
    ("left", "right"), [((4, 2), (3, 5)), ((4, 2), (5, 2))], ids=["R differs", "right transposed"]
)
def test_products_that_do_not_chain_are_refused(left: tuple[int, int], right: tuple[int, int]) -> None:
    with pytest.raises(FactorShapeError) as error:
        Product(torch.ones(left), torch.ones(right))
    assert str(left) in str(error.value)
    assert str(right) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("A", "B"), [((2, 5), (4, 3)), ((2,), (4, 2)), ((2, 5), (4,)), ((1, 2, 5), (4, 2))], ids=str
)
def test_factors_that_are_no_pair_are_refused(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(FactorShapeError) as error:
        LoraFactors(torch.ones(A), torch.ones(B), 1.0)
    assert str(A) in str(error.value)
    assert str(B) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a"], "partition 3 lacks module b (2 modules are expected)"),
        (["a", "b", "c"], "partition 3 has the unknown module c (2 modules are expected)"),
        (["c", "d"], "partition 3 lacks module a (2 modules are expected)"),
    ],
)
def test_the_first_different_module_is_named(names: list[str], text: str) -> None:
    check_same_modules({"a": 1, "b": 1}, {"b": 2, "a": 2}, "partition 3")
    with pytest.raises(FactorShapeError) as error:
        check_same_modules({"a": 1, "b": 1}, dict.fromkeys(names), "partition 3")
    assert str(error.value) == text
