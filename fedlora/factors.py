"""LoRA factors as a type, and products of them that are never multiplied out.

Notation used by every rule (one adapted linear layer, weight ``W`` of shape (out, in)):

    A (r, in), B (out, r), s = scaling,  delta = s * B @ A

A rule may put a core R (r, r) between them, ``delta = s * B @ R @ A``; products fold it into A.

A sum of such products, for instance the target ``T = sum_k p_k s_k B_k A_k``, is kept *stacked*
as one `Product`: ``left (out, R) @ right (R, in)`` with ``R = sum_k r_k``. Norms, inner products
and the SVD of a `Product` cost O((out + in) R^2) and never need the (out, in) matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.errors import FactorShapeError

PLAIN = frozenset({"A", "B"})
"""The factors of a plain adapter."""
FACTORS = PLAIN | {"R"}
"""Those, and the core that some rules put between them."""

Tensors = dict[str, Tensor]
"""Named tensors: a trained head, a rule's own memory."""

DEPENDENT = 1e-3
"""A row that is this share of its length away from others adds no direction of its own."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One layer's adapter: ``delta = scaling * B @ A``, or ``scaling * B @ R @ A`` with a core.

    Attributes:
        A: (r, in), the factor that meets the input.
        B: (out, r), the factor that meets the output.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        R: (r, r), the core between them; None is the identity and costs nothing.

    Raises:
        FactorShapeError: A, B and R do not share a rank, or are not matrices.

    >>> f = LoraFactors(A=torch.ones(2, 3), B=torch.ones(4, 2), scaling=0.5)
    >>> f.rank, f.in_features, f.out_features, f.delta()[0, 0].item()
    (2, 3, 4, 1.0)
    """

    A: Tensor
    B: Tensor
    scaling: float
    R: Tensor | None = None

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise FactorShapeError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are not (r, in) and (out, r)"
            )
        if self.R is not None and self.R.shape != (self.rank, self.rank):
            raise FactorShapeError(f"R {tuple(self.R.shape)} is not the (r, r) core of rank {self.rank}")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    def delta(self) -> Tensor:
        """The dense (out, in) change of the weight; for export and tests only."""
        plain = self.folded()
        return plain.scaling * (plain.B @ plain.A)

    def tensors(self) -> Tensors:
        """The factors by name: A and B, and R where there is a core."""
        return {"A": self.A, "B": self.B} | ({} if self.R is None else {"R": self.R})

    def folded(self) -> LoraFactors:
        """The same delta without a core, ``A' = R A``; itself where there is none."""
        return self if self.R is None else LoraFactors(self.R @ self.A, self.B, self.scaling)


AdapterSet = dict[str, LoraFactors]
"""Module name (as in ``model.named_modules()``) -> its factors."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix held as ``left (out, R) @ right (R, in)``."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise FactorShapeError(
                f"left {tuple(self.left.shape)} and right {tuple(self.right.shape)} do not chain"
            )

    @property
    def rank_bound(self) -> int:
        """R: the product's rank is at most this, and at most min(out, in)."""
        return self.left.shape[1]

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def dense(self) -> Tensor:
        """The (out, in) matrix; for applying to a base weight and for tests."""
        return self.left @ self.right


def stack(terms: Iterable[tuple[float, LoraFactors]]) -> Product:
    """``sum_k w_k s_k B_k A_k`` as one product: weight and scaling go into the right factor only.

    >>> f = LoraFactors(torch.ones(1, 2), torch.ones(3, 1), 2.0)
    >>> stack([(0.25, f), (0.75, f)]).dense()[0, 0].item()
    2.0
    """
    pairs = [(w, f.folded()) for w, f in terms]
    return Product(
        torch.cat([f.B for _, f in pairs], dim=1),
        torch.cat([(w * f.scaling) * f.A for w, f in pairs], dim=0),
    )


def add(*products: Product) -> Product:
    """The sum of products of one shape, still stacked."""
    return Product(
        torch.cat([p.left for p in products], dim=1), torch.cat([p.right for p in products], dim=0)
    )


def scale(factor: float, product: Product) -> Product:
    """``factor * product``; the factor goes into the right side."""
    return Product(product.left, factor * product.right)


def inner(p: Product, q: Product) -> float:
    """Frobenius inner product ``<P, Q> = sum[(L_P^T L_Q) * (R_P R_Q^T)]``, in float64.

    >>> one = Product(torch.ones(3, 1), torch.ones(1, 2))
    >>> inner(one, one)
    6.0
    """
    left = p.left.double().T @ q.left.double()
    right = p.right.double() @ q.right.double().T
    return float((left * right).sum())


def norm(p: Product) -> float:
    """Frobenius norm in float64, by Gram matrices (relative error about 1e-8 under cancellation).

    Where R is not smaller than the layer itself the dense matrix is the smaller one and is used instead.
    """
    if p.rank_bound >= min(p.left.shape[0], p.right.shape[1]):
        return float(torch.linalg.matrix_norm(p.left.double() @ p.right.double()))
    return math.sqrt(max(inner(p, p), 0.0))


def svd(p: Product) -> tuple[Tensor, Tensor, Tensor]:
    """The exact thin SVD ``U (out, q), S (q,), Vh (q, in)`` of a product, q = min(R, out, in).

    QR of both sides, then an SVD of the R x R core; where R is not smaller than the layer itself the
    dense matrix is the smaller one and is used instead. All of it in float64, the results in the factors'
    dtype: clients that start from one adapter make stacks of nearly parallel rows, and a float32 QR takes
    their rounding for directions in which they differ.

    Signs are fixed so that equal inputs give equal bits: in each row of Vh the entry of
    largest magnitude is positive.
    """
    left, right = p.left.double(), p.right.double()
    if p.rank_bound >= min(left.shape[0], right.shape[1]):
        U, S, Vh = torch.linalg.svd(left @ right, full_matrices=False)
    else:
        reflectors_left, reflectors_right = torch.geqrf(left), torch.geqrf(right.T)
        core = _triangle(reflectors_left[0]) @ _triangle(reflectors_right[0]).T
        core_U, S, core_Vh = torch.linalg.svd(core, full_matrices=False)
        U, Vh = _reflected(*reflectors_left, core_U), _reflected(*reflectors_right, core_Vh.T).T
    peak = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(Vh.dtype)
    dtype = p.left.dtype
    return (U * sign.T).to(dtype), S.to(dtype), (Vh * sign).to(dtype)


def _triangle(packed: Tensor) -> Tensor:
    """R of a QR in LAPACK's packed form."""
    return packed[: packed.shape[1]].triu()


def _reflected(packed: Tensor, tau: Tensor, core: Tensor) -> Tensor:
    """``Q @ core`` of a QR in LAPACK's packed form; Q itself is never formed."""
    padded = core.new_zeros(core.shape[1], packed.shape[0]).T  # by columns, as LAPACK wants it
    padded[: core.shape[0]] = core
    product: Tensor = torch.ormqr(packed, tau, padded)
    return product


def compact_svd(p: Product) -> tuple[Tensor, Tensor, Tensor]:
    """`svd` without the directions that are rounding: ``S > R eps ||left|| ||right||``, eps of float64.

    A product that lacks rank (clients that agree, a zero B) has singular values near 1e-16 there, and
    singular vectors that mean nothing. A product of zeros has none at all.
    """
    U, S, Vh = svd(p)
    terms = torch.linalg.matrix_norm(p.left) * torch.linalg.matrix_norm(p.right)
    q = int(S.gt(p.rank_bound * torch.finfo(torch.float64).eps * terms).sum())
    return U[:, :q], S[:q], Vh[:q]


def truncate(p: Product, rank: int, scaling: float) -> LoraFactors:
    """The best rank-``rank`` approximation (Eckart-Young) as an adapter of that scaling.

    A has orthonormal rows, B carries the singular values: ``A = V_r^T, B = U_r S_r / scaling``.
    Missing directions (R < rank) are zero rows and columns, so the adapter always has ``rank``.
    """
    return _leading(*svd(p), rank, scaling)


def split(p: Product, rank: int, scaling: float) -> tuple[LoraFactors, Product]:
    """`truncate`, and what it leaves: ``p = scaling B A + rest``, each with no direction that is rounding.

    The rest ``[U_j] [S_j V_j^T], j > rank`` has as few columns as it has directions, possibly none.
    """
    U, S, Vh = compact_svd(p)
    return _leading(U, S, Vh, rank, scaling), Product(U[:, rank:].contiguous(), S[rank:, None] * Vh[rank:])


def _leading(U: Tensor, S: Tensor, Vh: Tensor, rank: int, scaling: float) -> LoraFactors:
    q = min(rank, S.numel())
    A = Vh.new_zeros(rank, Vh.shape[1])
    B = U.new_zeros(U.shape[0], rank)
    A[:q] = Vh[:q]
    B[:, :q] = U[:, :q] * (S[:q] / scaling)
    return LoraFactors(A, B, scaling)


def completed(factors: LoraFactors, spare: Tensor, generator: torch.Generator) -> LoraFactors:
    """The same product without dead directions: where a column of B is zero, A gets a row to train with.

    A zero column of B over a zero row of A stays zero: neither has a gradient. The new rows are
    orthonormal and at right angles to the rows that count. Only where r > in is there room for fewer.

    Args:
        factors: orthonormal rows of A wherever B is not zero, as from `split`.
        spare: (n, in), the rows to take the directions from, in this order.
        generator: draws those that ``spare`` has not.
    """
    live = factors.B.any(dim=0)
    held, offered = factors.A[live].double(), spare.double()
    missing = min(factors.rank, factors.in_features) - held.shape[0]
    if missing <= 0:
        return factors
    _, triangle = torch.linalg.qr(torch.cat([held, offered]).T)
    own = triangle.diagonal()[held.shape[0] :].abs()  # length of each offered row outside those before it
    offered = offered[: own.numel()]
    offered = offered[own > DEPENDENT * torch.linalg.vector_norm(offered, dim=1)]
    drawn = torch.randn(missing, factors.in_features, generator=generator, dtype=torch.float64)
    rows = torch.cat([held, offered, drawn])[: held.shape[0] + missing]
    basis, triangle = torch.linalg.qr(rows.T)
    basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    A = factors.A.clone()
    A[(~live).nonzero().flatten()[:missing]] = basis.T[held.shape[0] :].to(A.dtype)
    return replace(factors, A=A)


def resize(factors: LoraFactors, rank: int, scaling: float) -> LoraFactors:
    """The leading ``rank`` rows of A and columns of B (zero-padded if there are fewer), and of a core both.

    B absorbs the change of scaling, so that with ``rank`` at least the old one the product stays. Where
    there is a core it does so instead: A and B are then the same for everybody.
    """
    q = min(rank, factors.rank)
    A = factors.A.new_zeros(rank, factors.in_features)
    B = factors.B.new_zeros(factors.out_features, rank)
    A[:q] = factors.A[:q]
    if factors.R is None:
        B[:, :q] = factors.B[:, :q] * (factors.scaling / scaling)
        return LoraFactors(A, B, scaling)
    B[:, :q] = factors.B[:, :q]
    R = factors.R.new_zeros(rank, rank)
    R[:q, :q] = factors.R[:q, :q] * (factors.scaling / scaling)
    return LoraFactors(A, B, scaling, R)


def as_product(factors: LoraFactors) -> Product:
    """The adapter's delta as a product (scaling in the right side)."""
    return stack([(1.0, factors)])


def check_same_modules(expected: Mapping[str, object], given: Mapping[str, object], who: str) -> None:
    """Refuse adapters over other modules than expected, naming the first difference."""
    missing = sorted(set(expected) - set(given))
    foreign = sorted(set(given) - set(expected))
    if missing or foreign:
        what, name = ("lacks", missing[0]) if missing else ("has the unknown", foreign[0])
        raise FactorShapeError(f"{who} {what} module {name} ({len(expected)} modules are expected)")
