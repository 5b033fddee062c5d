"""LoRA factors as a type, and products of them that are never multiplied out.

Notation used by every rule (one adapted linear layer, weight ``W`` of shape (out, in)):

    A (r, in), B (out, r), s = scaling,  delta = s * B @ A

A rule may put a core R (r, r) between them, ``delta = s * B @ R @ A``; products fold it into A. Where some of
its directions rest they are held apart, ``delta = s * (B @ A + B0 @ A0)``.

A sum of such products, for instance the target ``T = sum_k p_k s_k B_k A_k``, is kept *stacked*
as one `Product`: ``left (out, R) @ right (R, in)`` with ``R = sum_k r_k``. Norms, inner products
and the SVD of a `Product` cost O((out + in) R^2) and never need the (out, in) matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.errors import FactorShapeError

PLAIN = frozenset({"A", "B"})
"""The factors of a plain adapter."""
AT_REST = frozenset({"A0", "B0"})
"""Directions of an adapter that nobody trains for a while, see `fedlora.core.directions`."""
FACTORS = PLAIN | {"R"} | AT_REST
"""Those, and the core that some rules put between A and B."""

Tensors = dict[str, Tensor]
"""Named tensors: a trained head, a rule's own memory."""


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """One layer's adapter: ``delta = scaling * B @ A``, or ``scaling * B @ R @ A`` with a core.

    Attributes:
        A: (r, in), the factor that meets the input.
        B: (out, r), the factor that meets the output.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        R: the core between them, (r, r), or (h, r/h, r/h) where it is zero but for h blocks on its diagonal;
            None is the identity and costs nothing.
        A0, B0: (q, in) and (out, q), further directions, which are at rest; None where none is. Not beside a
            core.

    Raises:
        FactorShapeError: A, B and R do not share a rank, or are not matrices; likewise A0 and B0.

    >>> f = LoraFactors(A=torch.ones(2, 3), B=torch.ones(4, 2), scaling=0.5)
    >>> f.rank, f.in_features, f.out_features, f.delta()[0, 0].item()
    (2, 3, 4, 1.0)
    """

    A: Tensor
    B: Tensor
    scaling: float
    R: Tensor | None = None
    A0: Tensor | None = None
    B0: Tensor | None = None

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise FactorShapeError(
                f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)} are not (r, in) and (out, r)"
            )
        if self.R is not None and not is_core(self.R, self.rank):
            raise FactorShapeError(
                f"R {tuple(self.R.shape)} is not the (r, r) core of rank {self.rank}, nor blocks of it"
            )
        if self.A0 is None and self.B0 is None:
            return
        if self.A0 is None or self.B0 is None or self.R is not None:
            raise FactorShapeError("directions at rest are both of A0 and B0, and there is no core R")
        q = self.A0.shape[0]
        if (tuple(self.A0.shape), tuple(self.B0.shape)) != ((q, self.in_features), (self.out_features, q)):
            raise FactorShapeError(
                f"A0 {tuple(self.A0.shape)} and B0 {tuple(self.B0.shape)} are not (q, in) and (out, q)"
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def whole_rank(self) -> int:
        """The rank with the directions at rest."""
        return self.rank + (0 if self.A0 is None else self.A0.shape[0])

    @property
    def in_features(self) -> int:
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        return self.B.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in): the weight's, which the delta has too."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """The dense (out, in) change of the weight; for export and tests only."""
        plain = self.folded()
        return plain.scaling * (plain.B @ plain.A)

    def tensors(self) -> Tensors:
        """The factors by name: A and B, R where there is a core, A0 and B0 where directions rest."""
        named = {"A": self.A, "B": self.B, "R": self.R, "A0": self.A0, "B0": self.B0}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def replaced(self, tensors: Mapping[str, Tensor]) -> LoraFactors:
        """The same with these factors in place of its own."""
        return LoraFactors(scaling=self.scaling, **{**self.tensors(), **tensors})

    def part(self, roles: Iterable[str]) -> frozenset[str]:
        """The names of the tensors in these roles: the factors are their own, see `NamedTensors.parts`."""
        return frozenset(roles)

    def folded(self) -> LoraFactors:
        """The same delta in A and B alone, ``A' = R A`` or ``A' = [A; A0]``; itself where it is so."""
        if self.A0 is not None and self.B0 is not None:
            A, B = torch.cat([self.A, self.A0]), torch.cat([self.B, self.B0], dim=1)
            return LoraFactors(A, B, self.scaling)
        return self if self.R is None else LoraFactors(after_core(self.R, self.A), self.B, self.scaling)


AdapterSet = dict[str, LoraFactors]
"""Module name (as in ``model.named_modules()``) -> its factors."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix held as ``left (out, R) @ right (R, in)``."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
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


def bounded(product: Product) -> Product:
    """The same matrix at a rank of min(out, in) at most: itself, or the smaller identity times the matrix."""
    out_features, in_features = product.left.shape[0], product.right.shape[1]
    if product.rank_bound <= min(out_features, in_features):
        return product
    if out_features < in_features:
        return Product(torch.eye(out_features, dtype=product.left.dtype), product.dense())
    return Product(product.dense(), torch.eye(in_features, dtype=product.left.dtype))


def inner(p: Product, q: Product) -> float:
    """Frobenius inner product ``<P, Q> = sum[(L_P^T L_Q) * (R_P R_Q^T)]``, in float64.

    >>> one = Product(torch.ones(3, 1), torch.ones(1, 2))
    >>> inner(one, one)
    6.0
    """
    left = p.left.double().T @ q.left.double()  # (R_p, R_q)
    right = p.right.double() @ q.right.double().T  # (R_p, R_q)
    return float((left * right).sum())


def norm(p: Product) -> float:
    """Frobenius norm in float64, by Gram matrices (relative error about 1e-8 under cancellation).

    Where R is not smaller than the layer itself the dense matrix is the smaller one and is used instead.
    """
    if p.rank_bound >= min(p.left.shape[0], p.right.shape[1]):
        return float(torch.linalg.matrix_norm(p.left.double() @ p.right.double()))
    return math.sqrt(max(inner(p, p), 0.0))


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
    if factors.R.ndim == 3:
        block = factors.R.shape[-1]
        R = factors.R.new_zeros(rank // block, block, block)
        R[: q // block] = factors.R[: q // block] * (factors.scaling / scaling)
        R = R if len(R) > 1 else R[0]
    else:
        R = factors.R.new_zeros(rank, rank)
        R[:q, :q] = factors.R[:q, :q] * (factors.scaling / scaling)
    return LoraFactors(A, B, scaling, R)


def is_core(R: Tensor, rank: int) -> bool:
    """Whether R is (r, r), or (h, b, b) with h b = r and h > 1."""
    if R.ndim == 3:
        return R.shape[0] > 1 and R.shape[1] == R.shape[2] and R.shape[0] * R.shape[1] == rank
    return R.shape == (rank, rank)


def after_core(R: Tensor, A: Tensor) -> Tensor:
    """``R A``, (..., r, in), of a core (..., r, r), or of its blocks (..., h, b, b)."""
    if R.shape[-1] == A.shape[-2]:
        return R @ A
    return (R @ A.reshape(*A.shape[:-2], *R.shape[-3:-1], A.shape[-1])).flatten(-3, -2)


def before_core(B: Tensor, R: Tensor) -> Tensor:
    """``B R``, (..., out, r), of a core (..., r, r), or of its blocks (..., h, b, b)."""
    return after_core(R.mT, B.mT).mT


def as_product(factors: LoraFactors) -> Product:
    """The adapter's delta as a product (scaling in the right side)."""
    return stack([(1.0, factors)])


def check_like(start: LoraFactors, given: LoraFactors, who: str, equal_ranks: str = "") -> None:
    """Refuse factors of another layer than expected, or a core where there is none.

    Args:
        start: what is expected.
        given: what is looked at.
        who: whose they are, for the message.
        equal_ranks: who needs their ranks to be equal, too; nobody if empty.

    Raises:
        FactorShapeError: the first difference.
    """
    if given.shape != start.shape:
        raise FactorShapeError(f"{who}: the layer is {given.shape}, expected {start.shape}")
    if (given.R is None) != (start.R is None):
        odd = "has no core R" if given.R is None else "has a core R that nobody asked for"
        raise FactorShapeError(f"{who}: the adapter {odd}")
    if equal_ranks and given.rank != start.rank:
        raise FactorShapeError(
            f"{who}: A has rank {given.rank}, expected {start.rank}; {equal_ranks} needs equal ranks"
        )


def check_same_modules(expected: Mapping[str, object], given: Mapping[str, object], who: str) -> None:
    """Refuse adapters over other modules than expected, naming the first difference."""
    missing = sorted(set(expected) - set(given))
    foreign = sorted(set(given) - set(expected))
    if missing or foreign:
        what, name = ("lacks", missing[0]) if missing else ("has the unknown", foreign[0])
        raise FactorShapeError(f"{who} {what} module {name} ({len(expected)} modules are expected)")
