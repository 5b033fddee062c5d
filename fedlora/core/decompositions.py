"""Singular value decompositions of stacked products, and orthonormal rows where they leave none.

All of it in float64 inside, the results in the factors' dtype.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedlora.core.factors import LoraFactors, Product

DEPENDENT = 1e-3
"""A row that is this share of its length away from others adds no direction of its own."""


def svd(p: Product) -> tuple[Tensor, Tensor, Tensor]:
    """The exact thin SVD ``U (out, q), S (q,), Vh (q, in)`` of a product, q = min(R, out, in).

    QR of both sides, then an SVD of the R x R core; where R is not smaller than the layer itself the
    dense matrix is the smaller one and is used instead. All of it in float64, the results in the factors'
    dtype: clients that start from one adapter make stacks of nearly parallel rows, and a float32 QR takes
    their rounding for directions in which they differ.

    Signs are fixed so that equal inputs give equal bits: in each row of Vh the entry of
    largest magnitude is positive.
    """
    dtype = p.left.dtype
    if p.rank_bound >= min(p.left.shape[0], p.right.shape[1]):
        U, S, Vh = torch.linalg.svd(p.left.double() @ p.right.double(), full_matrices=False)
        sign = _signs(Vh)
        return U.mul_(sign.T).to(dtype), S.to(dtype), Vh.mul_(sign).to(dtype)
    reflectors_left, reflectors_right = torch.geqrf(p.left.double()), torch.geqrf(p.right.T.double())
    core = _triangle(reflectors_left[0]) @ _triangle(reflectors_right[0]).T  # (R, R)
    core_U, S, core_Vh = torch.linalg.svd(core, full_matrices=False)
    Vh = _reflected(*reflectors_right, core_Vh.T).T
    del reflectors_right  # as large as a side in float64; layers are merged side by side
    sign = _signs(Vh)
    found = Vh.mul_(sign).to(dtype)
    del Vh
    return _reflected(*reflectors_left, core_U).mul_(sign.T).to(dtype), S.to(dtype), found


def _signs(Vh: Tensor) -> Tensor:
    """The sign of the entry of largest magnitude of each row, (q, 1)."""
    places = Vh.abs().argmax(dim=1, keepdim=True)
    return torch.where(Vh.gather(1, places) < 0, -1.0, 1.0).to(Vh.dtype)


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
    live = factors.B.any(dim=0)  # (r,)
    held, offered = factors.A[live].double(), spare.double()
    missing = min(factors.rank, factors.in_features) - held.shape[0]
    if missing <= 0:
        return factors
    _, triangle = torch.linalg.qr(torch.cat([held, offered]).T)
    own = triangle.diagonal()[held.shape[0] :].abs()  # length of each offered row outside those before it
    offered = offered[: own.numel()]
    offered = offered[own > DEPENDENT * torch.linalg.vector_norm(offered, dim=1)]
    drawn = torch.randn(missing, factors.in_features, generator=generator, dtype=torch.float64)
    rows = torch.cat([held, offered, drawn])[: held.shape[0] + missing]  # spare rows before drawn ones
    basis, triangle = torch.linalg.qr(rows.T)  # (in, held + missing)
    basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    A = factors.A.clone()
    A[(~live).nonzero().flatten()[:missing]] = basis.T[held.shape[0] :].to(A.dtype)
    return replace(factors, A=A)


def outside(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` orthonormal rows at right angles to the given orthonormal ones (k, n), drawn uniformly.

    Rows for which the space has no room left are zero.
    """
    k, n = rows.shape
    drawn = torch.randn(max(0, min(count, n - k)), n, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(torch.cat([rows.double(), drawn]).T)
    fresh = rows.new_zeros(count, n)
    fresh[: drawn.shape[0]] = (Q * R.diagonal().sign())[:, k : k + drawn.shape[0]].T
    return fresh
