"""Diagnostics of a round, measured alike for every rule.

With dW_k client k's change from the *global* effective weight before the round, W_before = W_0 + patches
+ s B A, and D = sum_k p_k dW_k = T - s B A the change that the clients' mean asks for:

    gap            = || W_after - (W_before + D) || / || D ||
    energy_lost    = || W_after - (W_before + D) ||^2 / || T ||^2
    cosine         = sum_{k != l} p_k p_l <dW_k, dW_l> / sum_{k != l} p_k p_l ||dW_k|| ||dW_l||
    effective_rank = (sum_j sigma_j^2)^2 / sum_j sigma_j^4, sigma_j the singular values of D

over all layers together (Frobenius; the effective rank is a mean over layers), in float64, from Gram
matrices; only where a layer has at least as many stacked ranks as rows or columns is the (out, in) matrix
the smaller one, and is used.

Read them together: a gap with a low energy_lost is a small correction to a large adapter; a low cosine
says that clients pull apart, so that averages of factors lose; an effective rank above r says that no
adapter of rank r can hold what the clients ask for.

A D that differs from zero by the rounding of T only asks for nothing; the quotient of two rounding errors
would be of order 1 for any rule, so the gap is 0 there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fedlora.core.adapters import as_lora
from fedlora.core.factors import LoraFactors, Product, add, as_product, norm, scale
from strategies.layer import Layer, Merged

RESOLUTION = 1e-6
"""A change below this share of T itself is float32 rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostics:
    """Diagnostics of one round's aggregation.

    Attributes:
        gap: relative aggregation error, 0 for exact rules up to rounding (about 1e-7 in float32).
        update_norm: Frobenius norm of the change D that the clients' mean asked for.
        cosine: mean cosine between the changes of two clients, weighted by their weights and sizes; 1
            where there is only one client; None where sums alone are known.
        effective_rank: how many directions D really has, from 1 to its rank; 0 where nothing is asked.
        energy_lost: share of the target's energy that neither the adapter nor the base got.
    """

    gap: float
    update_norm: float
    cosine: float | None
    effective_rank: float
    energy_lost: float

    def as_dict(self) -> dict[str, float]:
        """Those that are known, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMeasure:
    """One layer's squared norms, of D, what was missed, T and each dW_k, and sum_j sigma_j^4 of D."""

    asked: float
    missed: float
    target: float
    clients: Tensor
    fourth: float

    @property
    def resolved(self) -> bool:
        """Whether D is more than the rounding of T."""
        return self.asked > RESOLUTION**2 * self.target


def measure(layer: Layer, merged: Merged) -> LayerMeasure:
    """The measures of one layer."""
    start, end = as_product(layer.start), as_product(as_lora(merged.adapter))
    reached, asked_of = [end], 0.0
    if merged.into_base is not layer.target:  # else the target cancels, bit for bit
        asked_of = -1.0
        reached += [] if merged.into_base is None else [merged.into_base]
    everything = add(layer.target, start, *reached)
    if everything.rank_bound < min(layer.start.in_features, layer.start.out_features):
        return _by_grams(layer, everything, asked_of)
    change = add(layer.target, scale(-1.0, start))
    missed = norm(add(*reached, *([scale(-1.0, layer.target)] if asked_of else []))) ** 2
    return _by_matrix(layer, change, missed)


def summarise(layers: Sequence[LayerMeasure], weights: Sequence[float]) -> Diagnostics | None:
    """All layers together; None where nothing was measured."""
    if not layers:
        return None
    asked, missed, target = (sum(getattr(m, key) for m in layers) for key in ("asked", "missed", "target"))
    resolved = asked > RESOLUTION**2 * target
    ranks = [m.asked**2 / m.fourth for m in layers if m.resolved and m.fourth > 0]
    return Diagnostics(
        gap=math.sqrt(missed / asked) if resolved else 0.0,
        update_norm=math.sqrt(asked),
        cosine=_cosine(asked, torch.stack([m.clients for m in layers]).sum(dim=0), weights),
        effective_rank=sum(ranks) / len(ranks) if ranks else 0.0,
        energy_lost=missed / target if target > 0 and resolved else 0.0,
    )


def _cosine(asked: float, squares: Tensor, weights: Sequence[float]) -> float:
    p = torch.tensor(weights, dtype=torch.float64)
    sizes = p * squares.sqrt()
    pairs = float(sizes.sum() ** 2 - (sizes**2).sum())
    if pairs <= RESOLUTION * float(sizes.sum() ** 2):  # all but one stood still, up to rounding
        return 1.0
    return max(-1.0, min(1.0, (asked - float((sizes**2).sum())) / pairs))


def _by_grams(layer: Layer, everything: Product, asked_of: float) -> LayerMeasure:
    """All of it from one pair of Gram matrices over ``[T; s B A; what was reached]``.

    Args:
        layer: the round.
        everything: these products, stacked.
        asked_of: -1, or 0 where T is a part of what was reached.
    """
    left, right = everything.left.double(), everything.right.double()  # (out, R), (R, in)
    G_left, G_right = left.T @ left, right @ right.T
    pairs = G_left * G_right  # (R, R): <column i (x) row i, column j (x) row j>
    T, r = layer.target.rank_bound, layer.start.rank
    own, now, end = slice(T, T + r), slice(0, T + r), 0
    change, missed = torch.zeros(2, len(pairs), dtype=torch.float64)
    change[:T], change[own] = 1.0, -1.0
    missed[:T], missed[own.stop :] = asked_of, 1.0
    start = float(pairs[own, own].sum())
    squares, stacked = [], {*map(id, layer.stacked)}
    for client in layer.clients:
        block = slice(end, end + (client.factors.rank if id(client) in stacked else 0))
        p, end = client.weight, block.stop
        squares.append(
            float(pairs[block, block].sum()) / p**2 - 2 * float(pairs[block, own].sum()) / p + start
        )
    M = (G_left[now, now] * change[now]) @ (G_right[now, now] * change[now])  # eigenvalues sigma_j^2
    return LayerMeasure(
        asked=max(float(change @ pairs @ change), 0.0),
        missed=max(float(missed @ pairs @ missed), 0.0),
        target=max(float(pairs[:T, :T].sum()), 0.0),
        clients=torch.tensor(squares, dtype=torch.float64).clamp_min(0.0),
        fourth=float((M * M.T).sum()),
    )


def _by_matrix(layer: Layer, change: Product, missed: float) -> LayerMeasure:
    """The same from the (out, in) matrices, where the stack is larger than the layer."""
    D = change.dense().double()
    square = D @ D.T if D.shape[0] <= D.shape[1] else D.T @ D
    squares = [_difference(c.factors, layer.start) for c in layer.clients]
    return LayerMeasure(
        asked=float((D * D).sum()),
        missed=missed,
        target=norm(layer.target) ** 2,
        clients=torch.tensor(squares, dtype=torch.float64),
        fourth=float((square * square).sum()),
    )


def _difference(factors: LoraFactors, start: LoraFactors) -> float:
    """``|| s_k B_k A_k - s B A ||^2``."""
    return norm(add(as_product(factors), scale(-1.0, as_product(start)))) ** 2
