"""FedRot-LoRA's rotations (arXiv 2602.23638), by dense SVDs and polar decompositions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import polar

from tests.oracles.dense import Adapter, Array, Client, Outcome, kept, mean_a, mean_b


def fedrot(start: Adapter, clients: Sequence[Client], t: int, lam: float = 0.5) -> Outcome:
    """FedRot-LoRA (arXiv 2602.23638): rotate (B_k R, R^T A_k) towards the last A or B in turn, average.

    The paper's rounds count from 0, so that A is the reference in our rounds 2, 4, ... The released code's
    lam > 1 takes the best matrix of O(r) as it is.
    """
    aligned = []
    for k in clients:
        M = start.B.T @ k.B if t % 2 else start.A @ k.A.T
        R = best_rotation(M, reflections=True) if lam > 1 else soft_rotation(best_rotation(M), lam)
        aligned.append(Client(k.p, k.B @ R, R.T @ k.A, k.s))
    return kept(mean_b(start, aligned), mean_a(aligned), start.s)


def best_rotation(M: Array, *, reflections: bool = False) -> Array:
    """``V diag(1, .., 1, det(U V^T)) U^T`` with U S V^T = SVD(M), M = reference times client.

    With ``reflections`` the determinant may be -1: ``V U^T``.

    Where M leaves directions open, they follow the identity: the limit of M + eps I.
    """
    r = M.shape[0]
    if np.linalg.matrix_rank(M) < r:
        M = M + 1e-9 * (float(np.linalg.norm(M)) or 1.0) * np.eye(r)
    U, _, Vt = np.linalg.svd(M)
    signs = np.ones(r)
    signs[-1] = 1.0 if reflections else np.sign(np.linalg.det(U @ Vt))
    return np.asarray(Vt.T @ np.diag(signs) @ U.T)


def soft_rotation(R: Array, lam: float) -> Array:
    """The orthogonal factor of the polar decomposition of ``(1 - lam) I + lam R``."""
    return np.asarray(polar((1 - lam) * np.eye(R.shape[0]) + lam * R)[0])
