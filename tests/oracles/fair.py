"""LoRA-FAIR's problem for dB (arXiv 2411.14961), over all of dB (out, r) against the dense Delta W."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize

from tests.oracles.dense import Adapter, Array, Client, Outcome, Vector, kept, mean_a, mean_b, mean_update


def lora_fair(
    start: Adapter, clients: Sequence[Client], t: int,
    lam: float = 0.01, norm: str = "squared", solver: str = "cosine", correct: str = "B",
) -> Outcome:  # fmt: skip
    """LoRA-FAIR (arXiv 2411.14961, the problem for dB): all of dB (out, r), against the dense Delta W.

    dB = argmin 1 - cos(Delta W, (B + dB) A) + lam ||dB||_F^2 from dB = 0; A' = A, B' = B + dB.
    dA solves the transposed problem, after dB if both are corrected.
    """

    def correction(A: Array, B: Array, T: Array) -> Array:
        if solver == "ridge":
            return (T - B @ A) @ A.T @ np.linalg.inv(A @ A.T + lam * np.eye(A.shape[0]))
        return fair_correction(A, B, T, lam, norm)

    A, B, T = mean_a(clients), mean_b(start, clients), mean_update(clients) / start.s
    if correct in ("B", "both"):
        B = B + correction(A, B, T)
    if correct in ("A", "both"):
        A = A + correction(B.T, A.T, T.T).T
    return kept(B, A, start.s)


def fair_objective(A: Array, B: Array, T: Array, lam: float, dB: Array, norm: str = "squared") -> float:
    """``1 - cos(T, (B + dB) A) + lam ||dB||_F^2``, or ``lam ||dB||_F`` for the plain norm."""
    size = float(np.linalg.norm(dB))
    return 1.0 - cosine(T, (B + dB) @ A) + lam * (size**2 if norm == "squared" else size)


def fair_gradient(A: Array, B: Array, T: Array) -> Array:
    """The gradient of the cosine at dB = 0."""
    Z, tau = B @ A, np.linalg.norm(T)
    n = np.linalg.norm(Z)
    return np.asarray((T / (tau * n) - (T * Z).sum() / (tau * n**3) * Z) @ A.T)


def fair_correction(A: Array, B: Array, T: Array, lam: float, norm: str = "squared") -> Array:
    """The minimising dB, by Newton's method on the dense problem with ||B|| as unit.

    With the plain norm dB = 0 where the cosine is not steeper than lam; else the descent starts below it.

    Zero where the cosine at dB = 0 is undefined, and where the descent runs to (B + dB) A = 0: there is
    no minimum then, only an infimum.
    """
    if not (np.linalg.norm(T) > 0 and np.linalg.norm(B @ A) > 0):
        return np.zeros_like(B)
    size = float(np.linalg.norm(B))
    w, b = T.ravel() / np.linalg.norm(T), B.ravel() / size
    J = np.kron(np.eye(B.shape[0]), A.T)  # vec(B A) = J vec(B), row by row
    weight = lam * (size**2 if norm == "squared" else size)

    def penalty(x: Vector) -> tuple[float, Array, Array]:
        if norm == "squared":
            return float(x @ x), 2 * x, 2 * np.eye(x.size)
        n = float(np.linalg.norm(x))
        return n, x / n, (np.eye(x.size) - np.outer(x, x) / n**2) / n

    def value(x: Vector) -> float:
        return float(1.0 - cosine(w, J @ (b + x)) + weight * penalty(x)[0])

    def gradient(x: Vector) -> Vector:
        z = J @ (b + x)
        n = np.linalg.norm(z)
        slope: Vector = weight * penalty(x)[1] - J.T @ (w / n - (w @ z) * z / n**3)
        return slope

    def hessian(x: Vector) -> Array:
        z = J @ (b + x)
        n = np.linalg.norm(z)
        outer = np.outer(w, z) + np.outer(z, w) - 3 * (w @ z) / n**2 * np.outer(z, z)
        of_cosine = -(outer + (w @ z) * np.eye(z.size)) / n**3
        return np.asarray(weight * penalty(x)[2] - J.T @ of_cosine @ J)

    first = 0 * b
    if norm == "plain":
        down = size * fair_gradient(A, B, T).ravel()
        if np.linalg.norm(down) <= weight:
            return np.zeros_like(B)
        level = 1.0 - cosine(w, J @ b)
        steps = (0.5**k * down / np.linalg.norm(down) for k in range(40))
        below = next((x for x in steps if value(x) < level), None)
        if below is None:
            return np.zeros_like(B)
        first = below
    x = minimize(
        value, first, jac=gradient, hess=hessian, method="trust-ncg",
        options={"gtol": 1e-12, "maxiter": 500, "initial_trust_radius": 0.1, "max_trust_radius": 0.3},
    ).x  # fmt: skip
    if np.linalg.norm(J @ (b + x)) < 1e-3 * np.linalg.norm(J @ b):
        return np.zeros_like(B)
    for _ in range(3):
        x = x - np.linalg.lstsq(hessian(x), gradient(x))[0]
    return size * np.asarray(x, dtype=np.float64).reshape(B.shape)


def cosine(X: Array, Y: Array) -> float:
    """Cosine of two matrices as flat vectors."""
    return float((X * Y).sum() / (np.linalg.norm(X) * np.linalg.norm(Y)))
