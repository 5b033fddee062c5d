"""FedRPCA's split of the clients' changes (arXiv 2506.01194), by an SVD in each step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.oracles.dense import Adapter, Array, Client, Outcome, kept


def fedrpca(start: Adapter, clients: Sequence[Client], t: int, beta: float = 2.0) -> Outcome:
    """FedRPCA (arXiv 2506.01194): Algorithm 1 of Candès et al. 2011, by an SVD in each step."""

    def moved(X: Array, own: Sequence[Array]) -> Array:
        M = np.stack([(X_k - X).ravel() for X_k in own], axis=1)
        if not M.any():
            return X
        lam, mu = 1 / np.sqrt(max(M.shape)), M.size / (4 * np.abs(M).sum())
        S, Y = np.zeros_like(M), np.zeros_like(M)
        for _ in range(500):
            U, s, Vt = np.linalg.svd(M - S + Y / mu, full_matrices=False)
            L = (U * np.maximum(s - 1 / mu, 0)) @ Vt
            rest = M - L + Y / mu
            S = np.sign(rest) * np.maximum(np.abs(rest) - lam / mu, 0)
            Y = Y + mu * (M - L - S)
            if np.linalg.norm(M - L - S) <= 1e-7 * np.linalg.norm(M):
                break
        p = np.array([k.p for k in clients])
        return X + ((L + beta * (M - L)) @ p).reshape(X.shape)

    B = moved(start.B, [(k.s / start.s) * k.B for k in clients])
    return kept(B, moved(start.A, [k.A for k in clients]), start.s)
