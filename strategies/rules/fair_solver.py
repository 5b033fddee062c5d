"""The server problem of LoRA-FAIR, solved without the (out, in) matrix.

With the thin SVD ``A = P S V^T``, of rank q:

    Y = (B + dB) P (out, q),   (B + dB) A = Y S V^T,   cos = <T V, Y S> / (||T|| ||Y S||)

dB outside span(P) costs and gains nothing, and Y stays in span[B P, T V]: a QR of those two leaves a
(2q, q) unknown. Its length does not enter the cosine, and the length nearest ``Y_0 = B P`` is known, so
only a direction y is searched, by L-BFGS in float64 (searching the length too fails at the size that B
really has: at ||B|| = 0.01 the penalty is 1e-6 of the cosine's curvature). With c = max(cos(Y_0, y), 0):

    y = argmin 1 - cos(T V, y S) ||T V|| / ||T|| + penalty
    penalty = lam ||Y_0||^2 (1 - c^2)  (squared)   or   lam ||Y_0|| sqrt(1 - c^2)  (plain)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.core.factors import Product, norm

Matrix = NDArray[np.float64]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
ILL_CONDITIONED = 1e-6
"""Directions of A weaker than this times the strongest are left uncorrected."""


def cosine_correction(A: Tensor, B: Tensor, target: Product, lam: float, *, squared: bool = True) -> Tensor:
    """The dB (out, r) of least ``1 - cos(target, (B + dB) A) + lam ||dB||^2``, found from dB = 0.

    ``||dB||`` unless ``squared``: dB = 0 then wherever the cosine's gradient there is no longer than lam.

    Zero where the cosine is undefined (an A, a mean product or a target that vanishes), and where there
    is no minimum because the cosine wants a direction at a right angle to B or beyond, towards B' = 0.
    """
    P, S, V = _directions(A)
    start = B.double() @ P  # Y_0: (out, q)
    wanted = target.left.double() @ (target.right.double() @ V)  # T V: (out, q)
    tau, size = norm(target), float(start.norm())
    if tau == 0 or size == 0:
        return torch.zeros_like(B)
    basis, _ = torch.linalg.qr(torch.cat([start, wanted], dim=1))  # (out, 2q)
    problem = _Problem(
        unit=(basis.T @ start).numpy() / size,
        wanted=(basis.T @ wanted).numpy() / tau,
        singular=S.numpy(),
        weight=lam * (size**2 if squared else size),
        squared=squared,
    )
    y = _best_direction(problem)
    length = float((problem.unit * y).sum() / (y * y).sum())  # of the y nearest to Y_0
    if length <= 0:
        return torch.zeros_like(B)
    dB: Tensor = basis @ torch.from_numpy(size * (length * y - problem.unit)) @ P.T
    return dB.to(B.dtype)


def ridge_correction(A: Tensor, B: Tensor, target: Product, lam: float) -> Tensor:
    """The dB of least ``||target - (B + dB) A||^2 + lam ||dB||^2``, which minds the target's length, too.

    ``dB = (target - B A) A^T (A A^T + lam I)^-1 = (target V - B P S) diag(S_j / (S_j^2 + lam)) P^T``.
    """
    P, S, V = _directions(A)
    missing = target.left.double() @ (target.right.double() @ V) - (B.double() @ P) * S
    return ((missing * (S / (S**2 + lam))) @ P.T).to(B.dtype)


class _Problem(NamedTuple):
    """``1 - <wanted, y S> / ||y S|| + weight * penalty(y)`` over y (2q, q); ``unit`` is where y starts."""

    unit: Matrix
    wanted: Matrix
    singular: Matrix
    weight: float
    squared: bool

    def similarity(self, y: Matrix) -> tuple[float, Matrix]:
        """The cosine to the wanted direction, and its gradient."""
        z = y * self.singular
        n = float(np.linalg.norm(z))
        cosine = float((self.wanted * z).sum() / n)
        return cosine, (self.wanted / n - cosine * z / n**2) * self.singular

    def objective(self, flat: Vector) -> tuple[float, Vector]:
        """Objective and its gradient; y as a flat vector."""
        y = flat.reshape(self.unit.shape)
        cosine, slope = self.similarity(y)
        m = float(np.linalg.norm(y))
        along = max(float((self.unit * y).sum() / m), 0.0)
        across = self.unit - along * y / m
        if self.squared:
            penalty, falls = 1.0 - along**2, 2 * along * across / m
        else:
            penalty = float(np.linalg.norm(across))
            falls = along * across / (m * penalty) if penalty > 0 else 0 * across
        return 1.0 - cosine + self.weight * penalty, -(slope + self.weight * falls).ravel()


def _best_direction(problem: _Problem) -> Matrix:
    """The y that minimises the objective, by L-BFGS from ``unit``; ``unit`` itself in the dead zone."""
    from scipy.optimize import minimize  # where it is needed: every client's process reads the rules

    y = problem.unit if problem.squared else _off_the_kink(problem)
    if y is None:
        return problem.unit
    result = minimize(
        problem.objective, y.ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": 10_000, "maxfun": 50_000, "ftol": 1e-16, "gtol": 1e-12},
    )  # fmt: skip
    found: Matrix = result.x.reshape(y.shape)
    return found


def _off_the_kink(problem: _Problem) -> Matrix | None:
    """A y below ``unit`` along the cosine's gradient, since the plain norm has no gradient at ``unit``.

    None in the dead zone, where the penalty rises faster than the cosine in every direction.
    """
    cosine, slope = problem.similarity(problem.unit)
    steepness = float(np.linalg.norm(slope))
    if steepness <= problem.weight:
        return None
    for step in 0.5 ** np.arange(40):
        y: Matrix = problem.unit + step * slope / steepness
        if problem.objective(y.ravel())[0] < 1.0 - cosine:
            return y
    return None


def _directions(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``P (r, q), S (q,), V (in, q)`` of the thin SVD in float64, without the ill-conditioned directions."""
    P, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    keep = ILL_CONDITIONED * S[0] < S
    return P[:, keep], S[keep], Vh[keep].T
