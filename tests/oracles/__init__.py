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

import numpy as np

from tests.oracles.clusters import clusters
from tests.oracles.dense import (
    Adapter,
    Array,
    Client,
    Outcome,
    Vector,
    gap,
    kept,
    mean_a,
    mean_b,
    mean_update,
)
from tests.oracles.fair import cosine, fair_correction, fair_gradient, fair_objective, lora_fair
from tests.oracles.fedsvd import fedsvd, fedsvd_renew
from tests.oracles.robust_pca import fedrpca
from tests.oracles.rotations import best_rotation, fedrot, soft_rotation

__all__ = [
    "ORACLES",
    "Adapter",
    "Array",
    "Client",
    "Outcome",
    "Vector",
    "best_rotation",
    "clusters",
    "cosine",
    "fair_correction",
    "fair_gradient",
    "fair_objective",
    "gap",
    "mean_update",
    "soft_rotation",
]

Oracle = Callable[..., Outcome]


def fed_sb(
    start: Adapter, clients: Sequence[Client], t: int,
    subspace: str = "random", core: str = "dense", heads: int = 1,
    public_examples: int = 50, eta: float = 1e-4,
) -> Outcome:  # fmt: skip
    """Fed-SB (arXiv 2502.15436): R averaged between the frozen B and A.

    Where the subspace is found in private, the first two rounds average B, then A, as a product.
    """
    if subspace == "private" and t == 1:
        return kept(mean_b(start, clients), start.A, start.s)
    if subspace == "private" and t == 2:
        return kept(start.B, mean_a(clients), start.s)
    assert start.R is not None
    R = np.zeros_like(start.R)
    for k in clients:
        assert k.R is not None
        R += k.p * (k.s / start.s) * k.R
    return Outcome(Adapter(start.B, start.A, start.s, R), np.zeros((start.B.shape[0], start.A.shape[1])))


def fedavg(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FedIT (arXiv 2305.05644, Section 3): LoRA weights averaged as McMahan et al. Algorithm 1 does."""
    return kept(mean_b(start, clients), mean_a(clients), start.s)


def clustered(
    start: Adapter, clients: Sequence[Client], t: int, warmup_rounds: int = 1, most_clusters: int = 10
) -> Outcome:
    """The server's adapter is the mean over all clients; `clusters` has what clients start from."""
    return fedavg(start, clients, t)


def ffa(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FFA-LoRA (arXiv 2403.12313, Section 4): A stays A_0; B = sum_k p_k B_k."""
    return kept(mean_b(start, clients), start.A, start.s)


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


def fedask(start: Adapter, clients: Sequence[Client], t: int, sketch: int = 0) -> Outcome:
    """FedASK (arXiv 2507.09990, the authors' code) with a wide sketch: the SVD, its roots in both factors."""
    U, S, Vt = np.linalg.svd(mean_update(clients), full_matrices=False)
    root = np.sqrt(S[: start.A.shape[0]] / start.s)
    r = len(root)
    return Outcome(Adapter(U[:, :r] * root, root[:, None] * Vt[:r], start.s), np.zeros((len(U), Vt.shape[1])))


def raflora(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """By raFLoRA (arXiv 2602.13486): means over the clients that have a block of ranks; then SVD."""
    total, first = np.zeros((start.B.shape[0], start.A.shape[1])), 0
    for last in sorted({k.A.shape[0] for k in clients}):
        have = [k for k in clients if k.A.shape[0] >= last]
        for k in have:
            total += k.p / sum(h.p for h in have) * k.s * k.B[:, first:last] @ k.A[first:last]
        first = last
    best, _ = _split(total + start.s * start.B[:, first:] @ start.A[first:], start)
    return Outcome(best, np.zeros_like(total))


def fslora(start: Adapter, clients: Sequence[Client], t: int, rank: int = 0) -> Outcome:
    """FSLoRA (arXiv 2501.19389): what each client changed, put back where it was taken from, and averaged."""
    A, B = start.A.copy(), start.B.copy()
    for k in clients:
        for column, j in enumerate(k.held):
            A[j] += k.p * (k.A[column] - start.A[j])
            own = k.s * len(k.held) / (start.s * start.A.shape[0]) * k.B[:, column]
            B[:, j] += k.p * (own - start.B[:, j])
    return kept(B, A, start.s)


def fedex(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FedEx-LoRA (arXiv 2410.09432): the averages of both factors, and the residual added to W_0."""
    average = zero_padding(start, clients, t).adapter
    return Outcome(average, mean_update(clients) - average.delta())


def frlora(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FRLoRA (ICLR 2025, the released code): W += s mean(B) mean(A) - s B_0 A_0; back to B_0, A_0."""
    A = sum(k.p * k.A for k in clients)
    B = sum(k.p * (k.s / start.s) * k.B for k in clients)
    return Outcome(start, start.s * (B @ A) - start.s * (start.B @ start.A))


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
    return kept(B, A, start.s)


def fedmomentum(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FedMomentum (arXiv 2603.08014): the rank-r SVD stays as LoRA, the residual joins the backbone."""
    return Outcome(*_split(mean_update(clients), start))


def rolora(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """RoLoRA (arXiv 2502.01755): B is averaged in odd rounds, A in even ones; the other stays."""
    if t % 2:
        return kept(mean_b(start, clients), start.A, start.s)
    return kept(start.B, mean_a(clients), start.s)


def lora_a2(start: Adapter, clients: Sequence[Client], t: int, rank: int = 0) -> Outcome:
    """LoRA-A2 (arXiv 2410.22815): B moves by the mean of dB_k in odd rounds, A in even ones."""
    if t % 2:
        moved = sum((k.p * (k.s / start.s * k.B - start.B) for k in clients), np.zeros_like(start.B))
        return kept(start.B + moved, start.A, start.s)
    return kept(start.B, start.A + sum((k.p * (k.A - start.A) for k in clients), 0 * start.A), start.s)


def galore(start: Adapter, clients: Sequence[Client], t: int, projector: str = "aggregate") -> Outcome:
    """GaLore (arXiv 2403.03507) by turns: all of B' A, then of B A', joins the weight.

    Which directions the next round freezes shows in no product: the other factor is zero.
    """
    moved = mean_b(start, clients) @ start.A if t % 2 else start.B @ mean_a(clients)
    return Outcome(Adapter(np.zeros_like(start.B), np.zeros_like(start.A), start.s), start.s * moved)


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
    return kept(B, A, start.s)


def fedsa(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """FedSA-LoRA (arXiv 2410.01463, Algorithm 1): A = sum_k p_k A_k; no B reaches the server."""
    return kept(start.B, mean_a(clients), start.s)


def head_only(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """The control: no adapter moves."""
    return kept(start.B, start.A, start.s)


def local_only(start: Adapter, clients: Sequence[Client], t: int) -> Outcome:
    """The reference: nothing reaches the server."""
    return kept(start.B, start.A, start.s)


def _split(T: Array, start: Adapter) -> tuple[Adapter, Array]:
    """The best rank-r approximation of T as an adapter, and what it leaves."""
    U, S, Vt = np.linalg.svd(T, full_matrices=False)
    B, A = np.zeros_like(start.B), np.zeros_like(start.A)
    q = min(A.shape[0], S.size)
    B[:, :q], A[:q] = U[:, :q] * S[:q] / start.s, Vt[:q]
    return Adapter(B, A, start.s), T - (U[:, :q] * S[:q]) @ Vt[:q]


ORACLES: dict[str, Oracle] = {
    "fedavg": fedavg,
    "clustered": clustered,
    "ffa": ffa,
    "flora": flora,
    "florist": florist,
    "flexlora": flexlora,
    "raflora": raflora,
    "fedask": fedask,
    "fslora": fslora,
    "fedex": fedex,
    "frlora": frlora,
    "zero-padding": zero_padding,
    "fedmomentum": fedmomentum,
    "lora-fair": lora_fair,
    "hetlora": hetlora,
    "rolora": rolora,
    "turns": rolora,
    "lora-a2": lora_a2,
    "galore": galore,
    "fedrot": fedrot,
    "fedsvd": fedsvd,
    "fedsvd-renew": fedsvd_renew,
    "fedsa": fedsa,
    "fed-sb": fed_sb,
    "fedrpca": fedrpca,
    "head-only": head_only,
    "local-only": local_only,
}
"""By the rule's name; a rule that is listed without an oracle fails its tests."""
