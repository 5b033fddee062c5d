"""FedSVD (arXiv 2505.12805) and its renewing variant, by SVDs of the dense product."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.dense import Adapter, Client, Outcome, kept, mean_b


def fedsvd(start: Adapter, clients: Sequence[Client], t: int, period: int = 1) -> Outcome:
    """FedSVD (arXiv 2505.12805, Algorithm 1): U S V^T = SVD(B A); B' = U_r S_r, A' = V_r^T every n rounds.

    Where the layer has fewer than r singular values the missing rows and columns are zero.
    """
    B = mean_b(start, clients)
    if t % period:
        return kept(B, start.A, start.s)
    U, S, Vt = np.linalg.svd(B @ start.A, full_matrices=False)
    r, q = B.shape[1], min(B.shape[1], S.size)
    new_B, new_A = np.zeros((B.shape[0], r)), np.zeros((r, start.A.shape[1]))
    new_B[:, :q], new_A[:q] = U[:, :q] * S[:q], Vt[:q]
    return kept(new_B, new_A, start.s)


def fedsvd_renew(
    start: Adapter, clients: Sequence[Client], t: int, renew: float = 0.25, period: int = 1
) -> Outcome:
    """This project's variant of FedSVD: the n weakest singular directions of s B A move into the base.

    Which directions take their place shows in no product: their columns of B are zero.
    """
    B = mean_b(start, clients)
    if t % period:
        return kept(B, start.A, start.s)
    r = B.shape[1]
    keep = r - max(1, round(renew * r))
    U, S, Vt = np.linalg.svd(B @ start.A, full_matrices=False)
    strong = min(keep, S.size)
    new_B, new_A = np.zeros_like(B), np.zeros_like(start.A)
    new_B[:, :strong], new_A[:strong] = U[:, :strong] * S[:strong], Vt[:strong]
    weak = start.s * (U[:, keep:] * S[keep:]) @ Vt[keep:]
    return Outcome(Adapter(new_B, new_A, start.s), weak)
