"""Frozen bases for a trained core: B (o, r) and A (r, i) out of the base weight, or of cosines.

``principal``: SVFit (Sun et al., arXiv 2409.05926) trains the leading singular values,

    W_0 = U S V^T;   B = U_r,   A = V_r^T

``ldu``: LoLDU (Shi et al., arXiv 2410.13618) trains the diagonal of

    W_0 = P L D U;   b_j = (P L)_j,   a_j = U_j      with L and U of unit diagonal

Each b_j and a_j is brought to length 1 here: rows of U are divided by pivots, which may be as small as
rounding (entries beyond 100 are common), and a direction's number would have a scale of its own.

``cosine``: coefficients of a discrete cosine transform at fixed places, near LoCA (Du et al., arXiv
2502.06820), which learns places (they would differ by client):

    B = r columns of the cosine basis (DCT-II) of R^o,   A = r of that of R^i

drawn without repetition, so that a diagonal core is r coefficients at places in r rows and r columns.
Directions beyond the smaller side of a layer are zeros.

All three keep what is trained apart from what is given: the weight is W_0 + s B R A with R = 0 at first,
where the papers train the singular values or pivots themselves, a shift that changes no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Basis = tuple[Tensor, Tensor]
"""B (o, r) and A (r, i)."""


def principal(weight: Tensor, rank: int) -> Basis:
    """The leading singular vectors of a weight (o, i); in each row of A the largest entry is positive."""
    U, _, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    sign = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).sign()
    return _filled(weight, rank, U * sign.T, Vh * sign)


def ldu(weight: Tensor, rank: int) -> Basis:
    """The first columns of P L and rows of U of a weight (o, i), of length 1 each."""
    P, L, U = torch.linalg.lu(weight.double())
    B, lengths = P @ L, U.norm(dim=1, keepdim=True)
    A = torch.where(lengths > 0, U / lengths, 0.0)  # a weight of lower rank leaves rows of zeros
    return _filled(weight, rank, B / B.norm(dim=0), A)


def cosine(out_features: int, in_features: int, rank: int, draw: Callable[[str], torch.Generator]) -> Basis:
    """Drawn cosines of both sides, orthonormal.

    Args:
        out_features: o.
        in_features: i.
        rank: r.
        draw: the streams of the sides ``A`` and ``B``.
    """
    return _cosines(out_features, rank, draw("B")).T.contiguous(), _cosines(in_features, rank, draw("A"))


def _filled(weight: Tensor, rank: int, B: Tensor, A: Tensor) -> Basis:
    """The first ``rank`` columns of B and rows of A, zeros where there are fewer."""
    q = min(rank, A.shape[0])
    found = weight.new_zeros(B.shape[0], rank), weight.new_zeros(rank, A.shape[1])
    found[0][:, :q], found[1][:q] = B[:, :q], A[:q]
    return found


def _cosines(size: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, size): rows of the cosine basis at drawn frequencies."""
    from scipy.fft import idct  # where it is needed: every client's process reads the rules

    unit = torch.zeros(count, size, dtype=torch.float64)
    drawn = torch.randperm(size, generator=generator)[:count]
    unit[torch.arange(len(drawn)), drawn] = 1.0
    return torch.from_numpy(idct(unit.numpy(), norm="ortho")).float()
