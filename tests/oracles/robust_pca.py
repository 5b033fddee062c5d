"""FedRPCA's split of the clients' changes (arXiv 2506.01194), by an SVD in each step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.dense import Adapter, Array, Client, Outcome, kept


def fedrpca(start: Adapter, clients: Sequence[Client], t: int, beta: float = 2.0) -> Outcome:
    """FedRPCA (arXiv 2506.01194): the clients' changes split, their own part counted beta times."""

    def moved(X: Array, own: Sequence[Array]) -> Array:
        M = np.stack([(X_k - X).ravel() for X_k in own], axis=1)
        L, _ = pursuit(M)
        p = np.array([k.p for k in clients])
        return X + ((L + beta * (M - L)) @ p).reshape(X.shape)

    B = moved(start.B, [(k.s / start.s) * k.B for k in clients])
    return kept(B, moved(start.A, [k.A for k in clients]), start.s)


def pursuit(M: Array, tolerance: float = 1e-6, most_steps: int = 500) -> tuple[Array, Array]:
    """L and the multiplier Y: Boyd et al.'s over-relaxed ADMM (2011, 3.4.3) of Candès et al.'s problem.

    mu = 12 / ||M||_2 and relaxation 1.7, from the Y of Lin, Chen and Ma.
    """
    if not M.any():
        return M, M
    spectral, lam = np.linalg.norm(M, 2), 1 / np.sqrt(max(M.shape))
    mu, alpha = 12 / spectral, 1.7
    S, Y = np.zeros_like(M), M / max(spectral, np.abs(M).max() / lam)
    for _ in range(most_steps):
        L = smaller(M - S + Y / mu, 1 / mu)
        missed = np.linalg.norm(M - S - L)
        relaxed = alpha * L + (1 - alpha) * (M - S)
        rest = M - relaxed + Y / mu
        S = np.sign(rest) * np.maximum(np.abs(rest) - lam / mu, 0)
        Y = Y + mu * (M - relaxed - S)
        if missed <= tolerance * np.linalg.norm(M):
            break
    return smaller(M - S + Y / mu, 1 / mu), Y


def smaller(X: Array, threshold: float) -> Array:
    """X with each singular value less by the threshold, and none below zero."""
    U, s, Vt = np.linalg.svd(X, full_matrices=False)
    found: Array = (U * np.maximum(s - threshold, 0)) @ Vt
    return found
