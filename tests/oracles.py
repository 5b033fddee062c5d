"""Each paper's server equation, naive and dense, in NumPy float64: what the rules are measured against.

Nothing here comes from `fedlora` or `strategies`; every (out, in) matrix is multiplied out, every SVD
and every minimisation is of the full matrix. One function for one adapted layer and one round.

Notation (paper -> here):

    p_k = n_k / sum_j n_j over the sampled clients                               -> ``Client.p``
    alpha_k / r_k, the client's scaling                                          -> ``Client.s``
    B_k (out, r_k), A_k (r_k, in) after local training                           -> ``Client.B``, ``Client.A``
    global adapter before the round: B, A, scaling s                             -> ``Adapter``
    Delta W = sum_k p_k s_k B_k A_k  (FLoRA Eq. 3; LoRA-FAIR's Delta W)          -> ``mean_update``
    what is added to the base weight W_0 (FLoRA: W <- W + Delta W)               -> ``Outcome.into_base``

Where the papers have one common scaling it cancels; with unequal ones B_k stands for (s_k / s) B_k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Adapter:
    """``s B A`` of one layer."""

    B: Array
    A: Array
    s: float

    def delta(self) -> Array:
        return self.s * self.B @ self.A


@dataclass(frozen=True)
class Client:
    """One client's adapter after training, with its normalised weight."""

    p: float
    B: Array
    A: Array
    s: float


@dataclass(frozen=True)
class Outcome:
    """The next adapter and what moved into the base."""

    adapter: Adapter
    into_base: Array


Oracle = Callable[..., Outcome]


def mean_update(clients: Sequence[Client]) -> Array:
    """``sum_k p_k s_k B_k A_k``, the product that the clients' mean asks for."""
    total = np.zeros((clients[0].B.shape[0], clients[0].A.shape[1]))
    for k in clients:
        total += k.p * k.s * (k.B @ k.A)
    return total


def fedavg(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FedIT (arXiv 2305.05644, Section 3): LoRA weights averaged as McMahan et al. Algorithm 1 does."""
    return _kept(_mean_b(start, clients), _mean_a(clients), start.s)


def ffa(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FFA-LoRA (arXiv 2403.12313, Section 4): A stays A_0; B = sum_k p_k B_k."""
    return _kept(_mean_b(start, clients), start.A, start.s)


def flora(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FLoRA (arXiv 2409.05976, Eq. 4, Algorithm 1): W <- W + [B_1 .. B_m] [p_1 A_1; ..; p_m A_m].

    The product of the stacks is the sum of the products. The next adapter is new, so its B is zero; its
    A is redrawn by every client.
    """
    return Outcome(Adapter(np.zeros_like(start.B), start.A, start.s), mean_update(clients))


def lora_fair(start: Adapter, clients: Sequence[Client], t: int, lam: float = 0.01) -> Outcome:
    """LoRA-FAIR (arXiv 2411.14961, the problem for dB): all of dB (out, r), against the dense Delta W.

    dB = argmin 1 - cos(Delta W, (B + dB) A) + lam ||dB||_F^2 from dB = 0; A' = A, B' = B + dB.
    """
    A, B = _mean_a(clients), _mean_b(start, clients)
    return _kept(B + fair_correction(A, B, mean_update(clients) / start.s, lam), A, start.s)


def fair_objective(A: Array, B: Array, T: Array, lam: float, dB: Array) -> float:
    """``1 - cos(T, (B + dB) A) + lam ||dB||_F^2``."""
    return 1.0 - cosine(T, (B + dB) @ A) + lam * float((dB**2).sum())


def fair_correction(A: Array, B: Array, T: Array, lam: float) -> Array:
    """The minimising dB, by Newton's method on the dense problem with ||B|| as unit.

    Zero where the cosine at dB = 0 is undefined, and where the descent runs to (B + dB) A = 0: there is
    no minimum then, only an infimum.
    """
    if not (np.linalg.norm(T) > 0 and np.linalg.norm(B @ A) > 0):
        return np.zeros_like(B)
    size = float(np.linalg.norm(B))
    w, b = T.ravel() / np.linalg.norm(T), B.ravel() / size
    J, weight = np.kron(np.eye(B.shape[0]), A.T), lam * size**2  # vec(B A) = J vec(B), row by row

    def value(x: Vector) -> float:
        return float(1.0 - cosine(w, J @ (b + x)) + weight * x @ x)

    def gradient(x: Vector) -> Vector:
        z = J @ (b + x)
        n = np.linalg.norm(z)
        slope: Vector = 2 * weight * x - J.T @ (w / n - (w @ z) * z / n**3)
        return slope

    def hessian(x: Vector) -> Array:
        z = J @ (b + x)
        n = np.linalg.norm(z)
        outer = np.outer(w, z) + np.outer(z, w) - 3 * (w @ z) / n**2 * np.outer(z, z)
        of_cosine = -(outer + (w @ z) * np.eye(z.size)) / n**3
        return np.asarray(2 * weight * np.eye(x.size) - J.T @ of_cosine @ J)

    x = minimize(
        value, 0 * b, jac=gradient, hess=hessian, method="trust-ncg",
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


def fedsvd(start: Adapter, clients: Sequence[Client], t: int, period: int = 1) -> Outcome:
    """FedSVD (arXiv 2505.12805, Algorithm 1): U S V^T = SVD(B A); B' = U_r S_r, A' = V_r^T every n rounds.

    Where the layer has fewer than r singular values the missing rows and columns are zero.
    """
    B = _mean_b(start, clients)
    if t % period:
        return _kept(B, start.A, start.s)
    U, S, Vt = np.linalg.svd(B @ start.A, full_matrices=False)
    r, q = B.shape[1], min(B.shape[1], S.size)
    new_B, new_A = np.zeros((B.shape[0], r)), np.zeros((r, start.A.shape[1]))
    new_B[:, :q], new_A[:q] = U[:, :q] * S[:q], Vt[:q]
    return _kept(new_B, new_A, start.s)


def fedsvd_renew(
    start: Adapter, clients: Sequence[Client], t: int, renew: float = 0.25, period: int = 1
) -> Outcome:
    """This project's variant of FedSVD: the n weakest singular directions of s B A move into the base.

    Which directions take their place shows in no product: their columns of B are zero.
    """
    B = _mean_b(start, clients)
    if t % period:
        return _kept(B, start.A, start.s)
    r = B.shape[1]
    kept = r - max(1, round(renew * r))
    U, S, Vt = np.linalg.svd(B @ start.A, full_matrices=False)
    strong = min(kept, S.size)
    new_B, new_A = np.zeros_like(B), np.zeros_like(start.A)
    new_B[:, :strong], new_A[:strong] = U[:, :strong] * S[:strong], Vt[:strong]
    weak = start.s * (U[:, kept:] * S[kept:]) @ Vt[kept:]
    return Outcome(Adapter(new_B, new_A, start.s), weak)


def head_only(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """The control: no adapter moves."""
    return _kept(start.B, start.A, start.s)


def local_only(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """The reference: nothing reaches the server."""
    return _kept(start.B, start.A, start.s)


def gap(start: Adapter, clients: Sequence[Client], outcome: Outcome) -> tuple[float, float]:
    """``(||W_after - W_before - sum_k p_k dW_k||, ||sum_k p_k dW_k||)`` of one layer.

    dW_k = s_k B_k A_k - s B A, the client's change from the global weight before the round.
    """
    asked = mean_update(clients) - start.delta()
    done = outcome.into_base + outcome.adapter.delta() - start.delta()
    return float(np.linalg.norm(done - asked)), float(np.linalg.norm(asked))


def _mean_a(clients: Sequence[Client]) -> Array:
    total = np.zeros_like(clients[0].A)
    for k in clients:
        total += k.p * k.A
    return total


def _mean_b(start: Adapter, clients: Sequence[Client]) -> Array:
    total = np.zeros_like(start.B)
    for k in clients:
        total += k.p * (k.s / start.s) * k.B
    return total


def _kept(B: Array, A: Array, s: float) -> Outcome:
    return Outcome(Adapter(B, A, s), np.zeros((B.shape[0], A.shape[1])))


ORACLES: dict[str, Oracle] = {
    "fedavg": fedavg,
    "ffa": ffa,
    "flora": flora,
    "lora-fair": lora_fair,
    "fedsvd": fedsvd,
    "fedsvd-renew": fedsvd_renew,
    "head-only": head_only,
    "local-only": local_only,
}
"""By the rule's name; a rule that is listed without an oracle fails its tests."""
