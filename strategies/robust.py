"""Robust centres in place of the weighted mean, with Flower's own arithmetic where it has one.

* ``median``: per coordinate (Yin et al., ICML 2018; Flower's FedMedian). All clients count alike.
* ``trimmed-mean``: per coordinate, without the lowest and highest share (Yin et al.; Flower's
  FedTrimmedAvg). All clients count alike.
* ``multi-krum``: whole updates are chosen by their distances, the chosen ones averaged with their weights
  (Blanchard et al., NeurIPS 2017; Flower's MultiKrum).

They act on factors. Where both are trained, the median of A and that of B are two medians: robust, but no
client's product lies between. A rule that trains one factor has no such trouble. No robust centre is exact.

Rules whose aggregate is no mean (stacks, SVDs of products) take ``multi-krum``, which then compares what they
aggregate, the clients' products, whatever their ranks: with P_k = s_k B_k A_k, from Gram matrices of factors,

    d_kl^2 = sum_layers ||P_k - P_l||^2 + ||head_k - head_l||^2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum
from torch import Tensor

from fedlora.core.adapters import as_lora
from fedlora.core.factors import add, as_product
from fedlora.core.state import ClientUpdate
from fedlora.errors import ConfigError, RunFailed, unknown_name
from fedlora.wire import to_peft, to_record
from strategies.layer import Center

ROBUST = ("none", "median", "trimmed-mean", "multi-krum")


@dataclass(frozen=True)
class Median(Center):
    """Each coordinate's median over the clients; the mean of the middle two where they are even."""

    name: ClassVar[str] = "median"

    def of(self, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        return torch.from_numpy(np.median(_stacked(tensors), axis=0)).to(tensors[0].dtype)


@dataclass(frozen=True)
class TrimmedMean(Center):
    """Each coordinate's mean without ``floor(fraction m)`` clients at either end.

    Attributes:
        fraction: share cut off at each end, in [0, 0.5).

    Raises:
        ConfigError: a fraction outside.
    """

    fraction: float = 0.2
    name: ClassVar[str] = "trimmed-mean"

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 0.5:
            raise ConfigError(f"strategy.trim-fraction = {self.fraction}: must be in [0, 0.5)")

    def of(self, weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
        return torch.from_numpy(trim_mean(_stacked(tensors), self.fraction)).to(tensors[0].dtype)


@dataclass(frozen=True)
class MultiKrum(Center):
    """The updates nearest to their neighbours, averaged with their weights.

    Attributes:
        malicious: clients f that may lie; each update is scored by its m - f - 2 nearest.
        chosen: updates kept; 0 keeps m - f.
        products: distances are those between products, as the module says, in place of factors.

    Raises:
        ConfigError: a number below zero.
        RunFailed: a round with fewer than 2 f + 3 updates, the paper's condition.
    """

    malicious: int = 1
    chosen: int = 0
    products: bool = False
    name: ClassVar[str] = "multi-krum"

    def __post_init__(self) -> None:
        for key in ("malicious", "chosen"):
            if getattr(self, key) < 0:
                raise ConfigError(f"strategy.krum-{key} = {getattr(self, key)}: must be >= 0")

    def for_products(self) -> MultiKrum:
        return replace(self, products=True)

    def choose(self, updates: Sequence[ClientUpdate]) -> Sequence[ClientUpdate]:
        needed = 2 * self.malicious + 3
        if len(updates) < needed:
            raise RunFailed(
                f"strategy.krum-malicious = {self.malicious}: a round needs {needed} updates, "
                f"it has {len(updates)}"
            )
        kept = self.chosen or len(updates) - self.malicious
        if self.products:
            nearest = product_distances(updates).sort(dim=1).values[:, 1 : len(updates) - self.malicious - 1]
            best = set(nearest.sum(dim=1).argsort(stable=True)[:kept].tolist())
            return [u for number, u in enumerate(updates) if number in best]
        contents = [RecordDict({"arrays": to_record(to_peft(u.adapters, u.head))}) for u in updates]
        best = {id(content) for content in select_multikrum(contents, self.malicious, kept)}
        return [u for u, content in zip(updates, contents, strict=True) if id(content) in best]


def product_distances(updates: Sequence[ClientUpdate]) -> Tensor:
    """Squared distances d_kl^2 between the clients' products and heads together, (m, m) float64."""
    heads = [
        torch.cat([torch.zeros(1), *(t.reshape(-1) for _, t in sorted(u.head.items()))]) for u in updates
    ]
    flat = torch.stack(heads).double()
    gram = flat @ flat.T
    for module in updates[0].adapters:
        products = [as_product(as_lora(u.adapters[module])) for u in updates]
        stacked, sizes = add(*products), torch.tensor([p.rank_bound for p in products])
        left, right = stacked.left.double(), stacked.right.double()
        owner = torch.repeat_interleave(torch.eye(len(updates), dtype=torch.float64), sizes, dim=0)
        gram += owner.T @ ((left.T @ left) * (right @ right.T)) @ owner
    own = gram.diagonal()
    return (own[:, None] + own[None, :] - 2 * gram).clamp_min(0.0).fill_diagonal_(0.0)


def make_center(robust: str, *, trim_fraction: float = 0.2, malicious: int = 1, chosen: int = 0) -> Center:
    """The centre of that name.

    Raises:
        ConfigError: an unknown name, or a number out of range.
    """
    made: dict[str, Callable[[], Center]] = {
        "none": Center,
        "median": Median,
        "trimmed-mean": lambda: TrimmedMean(trim_fraction),
        "multi-krum": lambda: MultiKrum(malicious, chosen),
    }
    if robust not in made:
        raise unknown_name("strategy.robust", robust, ROBUST)
    return made[robust]()


def _stacked(tensors: Sequence[Tensor]) -> np.ndarray[tuple[int, ...], np.dtype[np.floating]]:
    return torch.stack(list(tensors)).numpy()
