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
from scipy.linalg import polar
from scipy.optimize import minimize

Array = NDArray[np.float64]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Adapter:
    """``s B A`` of one layer, or ``s B R A``."""

    B: Array
    A: Array
    s: float
    R: Array | None = None

    def delta(self) -> Array:
        return self.s * self.B @ (self.A if self.R is None else self.R @ self.A)


@dataclass(frozen=True)
class Client:
    """One client's adapter after training, with its normalised weight."""

    p: float
    B: Array
    A: Array
    s: float
    R: Array | None = None


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
        total += k.p * k.s * (k.B @ (k.A if k.R is None else k.R @ k.A))
    return total


def fed_sb(
    start: Adapter, clients: Sequence[Client], t: int,
    subspace: str = "random", public_examples: int = 50, eta: float = 1e-4,
) -> Outcome:  # fmt: skip
    """Fed-SB (arXiv 2502.15436): R averaged between the frozen B and A.

    Where the subspace is found in private, the first two rounds average B, then A, as a product.
    """
    if subspace == "private" and t == 1:
        return _kept(_mean_b(start, clients), start.A, start.s)
    if subspace == "private" and t == 2:
        return _kept(start.B, _mean_a(clients), start.s)
    assert start.R is not None
    R = np.zeros_like(start.R)
    for k in clients:
        assert k.R is not None
        R += k.p * (k.s / start.s) * k.R
    return Outcome(Adapter(start.B, start.A, start.s, R), np.zeros((start.B.shape[0], start.A.shape[1])))


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


def florist(start: Adapter, clients: Sequence[Client], t: int, threshold: float = 0.9) -> Outcome:
    """FLoRIST (arXiv 2506.09199): FLoRA's sum, cut after the first p with enough cumulated energy."""
    U, S, Vt = np.linalg.svd(mean_update(clients), full_matrices=False)
    share = np.cumsum(S**2) / np.sum(S**2)
    p = 1 + int(np.argmax(share >= threshold - 1e-12))
    return Outcome(Adapter(np.zeros_like(start.B), start.A, start.s), (U[:, :p] * S[:p]) @ Vt[:p])


def flexlora(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FlexLoRA (arXiv 2402.11505, Section 3): the rank-r SVD of sum_k p_k s_k B_k A_k, all of it in B."""
    best, _ = _split(mean_update(clients), start)
    return Outcome(best, np.zeros((start.B.shape[0], start.A.shape[1])))


def fedex(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FedEx-LoRA (arXiv 2410.09432): the averages of both factors, and the residual added to W_0."""
    average = zero_padding(start, clients, t).adapter
    return Outcome(average, mean_update(clients) - average.delta())


def zero_padding(start: Adapter, clients: Sequence[Client], t: int, renormalise: bool = False) -> Outcome:
    """Zero-padding (arXiv 2401.06432), RBLA (arXiv 2408.08699): entry by entry of every row j < r."""
    r = start.A.shape[0]
    A, B = np.zeros_like(start.A), np.zeros_like(start.B)
    for j in range(r):
        have = [k for k in clients if k.A.shape[0] > j]
        total = sum(k.p for k in have) if renormalise else 1.0
        if renormalise and not have:
            A[j], B[:, j] = start.A[j], start.B[:, j]
        for k in have:
            A[j] += k.p / total * k.A[j]
            B[:, j] += k.p / total * (k.s / start.s) * k.B[:, j]
    return _kept(B, A, start.s)


def fedmomentum(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FedMomentum (arXiv 2603.08014): the rank-r SVD stays as LoRA, the residual joins the backbone."""
    return Outcome(*_split(mean_update(clients), start))


def rolora(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """RoLoRA (arXiv 2502.01755): B is averaged in odd rounds, A in even ones; the other stays."""
    if t % 2:
        return _kept(_mean_b(start, clients), start.A, start.s)
    return _kept(start.B, _mean_a(clients), start.s)


def fedrot(start: Adapter, clients: Sequence[Client], t: int, lam: float = 0.5) -> Outcome:
    """FedRot-LoRA (arXiv 2602.23638): rotate (B_k R, R^T A_k) towards the last A or B in turn, average.

    The paper's rounds count from 0, so that A is the reference in our rounds 2, 4, ...
    """
    aligned = []
    for k in clients:
        M = start.B.T @ k.B if t % 2 else start.A @ k.A.T
        R = soft_rotation(best_rotation(M), lam)
        aligned.append(Client(k.p, k.B @ R, R.T @ k.A, k.s))
    return _kept(_mean_b(start, aligned), _mean_a(aligned), start.s)


def best_rotation(M: Array) -> Array:
    """``V diag(1, .., 1, det(U V^T)) U^T`` with U S V^T = SVD(M), M = reference times client.

    Where M leaves directions open, they follow the identity: the limit of M + eps I.
    """
    r = M.shape[0]
    if np.linalg.matrix_rank(M) < r:
        M = M + 1e-9 * (float(np.linalg.norm(M)) or 1.0) * np.eye(r)
    U, _, Vt = np.linalg.svd(M)
    signs = np.ones(r)
    signs[-1] = np.sign(np.linalg.det(U @ Vt))
    return np.asarray(Vt.T @ np.diag(signs) @ U.T)


def soft_rotation(R: Array, lam: float) -> Array:
    """The orthogonal factor of the polar decomposition of ``(1 - lam) I + lam R``."""
    return np.asarray(polar((1 - lam) * np.eye(R.shape[0]) + lam * R)[0])


def hetlora(
    start: Adapter, clients: Sequence[Client], t: int,
    gamma: float = 0.99, lam: float = 0.01, min_rank: int = 2,
) -> Outcome:  # fmt: skip
    """HetLoRA (arXiv 2401.06432): zero-padded means, w_k = ||dW_k||_F / sum_j ||dW_j||_F of dense dW_k.

    The options decide what clients have, not what the server makes of it.
    """
    sizes = np.array([np.linalg.norm(k.s * k.B @ k.A) for k in clients])
    weights = sizes / sizes.sum() if sizes.sum() > 0 else np.array([k.p for k in clients])
    A, B = np.zeros_like(start.A), np.zeros_like(start.B)
    for w, k in zip(weights, clients, strict=True):
        r = k.A.shape[0]
        A[:r] += w * k.A
        B[:, :r] += w * (k.s / start.s) * k.B
    return _kept(B, A, start.s)


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

    A, B, T = _mean_a(clients), _mean_b(start, clients), mean_update(clients) / start.s
    if correct in ("B", "both"):
        B = B + correction(A, B, T)
    if correct in ("A", "both"):
        A = A + correction(B.T, A.T, T.T).T
    return _kept(B, A, start.s)


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


def fedsa(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FedSA-LoRA (arXiv 2410.01463, Algorithm 1): A = sum_k p_k A_k; no B reaches the server."""
    return _kept(start.B, _mean_a(clients), start.s)


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


def _split(T: Array, start: Adapter) -> tuple[Adapter, Array]:
    """The best rank-r approximation of T as an adapter, and what it leaves."""
    U, S, Vt = np.linalg.svd(T, full_matrices=False)
    B, A = np.zeros_like(start.B), np.zeros_like(start.A)
    q = min(A.shape[0], S.size)
    B[:, :q], A[:q] = U[:, :q] * S[:q] / start.s, Vt[:q]
    return Adapter(B, A, start.s), T - (U[:, :q] * S[:q]) @ Vt[:q]


def _kept(B: Array, A: Array, s: float) -> Outcome:
    return Outcome(Adapter(B, A, s), np.zeros((B.shape[0], A.shape[1])))


ORACLES: dict[str, Oracle] = {
    "fedavg": fedavg,
    "ffa": ffa,
    "flora": flora,
    "florist": florist,
    "flexlora": flexlora,
    "fedex": fedex,
    "zero-padding": zero_padding,
    "fedmomentum": fedmomentum,
    "lora-fair": lora_fair,
    "hetlora": hetlora,
    "rolora": rolora,
    "fedrot": fedrot,
    "fedsvd": fedsvd,
    "fedsvd-renew": fedsvd_renew,
    "fedsa": fedsa,
    "fed-sb": fed_sb,
    "head-only": head_only,
    "local-only": local_only,
}
"""By the rule's name; a rule that is listed without an oracle fails its tests."""
