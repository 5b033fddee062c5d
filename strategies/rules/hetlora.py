"""HetLoRA: each client has the leading rows of one adapter, and as many of them as it makes use of.

Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", EMNLP 2024
(arXiv 2401.06432).

    down:   A[:r_k, :], B[:, :r_k] of the global pair of rank r
    client: loss + lam sum_layers ||B_k[:, c:]||_F ||A_k[c:, :]||_F,    c = max(min_rank, floor(gamma r_k))
    prune:  r_k <- c  where that tail, summed over the layers, is smaller than it was at the start
    server: A' = sum_k w_k A_k,  B' = sum_k w_k (s_k / s) B_k,  zero-padded to rank r,
            w_k = s_k ||B_k A_k||_F / sum_j s_j ||B_j A_j||_F      (sparsity-weighted)

w_k is taken for each layer, by Gram matrices wherever these are the smaller ones; whether the paper means
that or the norm of the whole model could not be verified. As in the paper the numbers of examples do not
enter: p_k counts for the head alone, and where all products vanish.

Choices: the paper prunes at the client before it sends; here the server compares what it sent with what
came back, so the tail of that round still counts and the next broadcast is smaller. A pruned rank stays
pruned, over rounds that the client sits out, too; its scaling stays, so that the leading product keeps its
value. The paper's own gamma, lam and least rank were not at hand; 0.99, 0.01 and 2 are those of a public
reimplementation. The penalty's gradient needs no data and is added after the noise in private training.
A ClientApp that is not fedlora's trains without it, and its model keeps its rank: under `keep_ranks` what is
pruned travels as zeros in A and B, which have no gradient, and is cut off again
(`strategies.precision.padded`).

Not exact, even for equal A: padding shrinks what only some clients have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlora.core.adapters import as_lora, lora_set
from fedlora.core.factors import LoraFactors, Tensors, as_product, norm, resize
from fedlora.core.init_drawn import FRESH
from fedlora.core.state import Broadcast, ClientSpec, ClientUpdate, RankRegularizer, State
from fedlora.errors import ConfigError
from strategies.diagnostics import Diagnostics
from strategies.facts import Facts
from strategies.layer import Layer, Merged, weighted_sum
from strategies.rule import Rule

RANK = "rank"
"""Owner of the remembered ranks: ``rank/<partition id>`` in `State.memory`."""


@dataclass(frozen=True, kw_only=True)
class HetLoRARule(Rule):
    """Zero-padded factors averaged by the size of their products; ranks shrink where a tail does.

    Attributes:
        gamma: share of its rank that a client keeps when it is pruned, in (0, 1]; 1 never prunes.
        lam: weight of the tail in the clients' loss, >= 0.
        min_rank: no client is pruned below this rank, >= 1.
    """

    gamma: float = 0.99
    lam: float = 0.01
    min_rank: int = 2

    penalises_tails: ClassVar[bool] = True
    facts: ClassVar[Facts] = Facts(
        name="hetlora",
        title="HetLoRA",
        paper="Cho et al., EMNLP 2024, arXiv 2401.06432",
        exact=False,
        mixed_ranks=True,
        mean=False,
        stale="ranks are pruned after each round",
        custom_weights=True,
        secure_sum=False,
        supported_inits=(*FRESH, "eva"),
        inits_why="prunes ranks, and with them what was taken out of the base",
        up="r_k(o+i)",
        down="r_k(o+i)",
        deviation="the server decides on pruning, a round late; weights are by norms of each layer, whether "
        "the paper's are of the whole model could not be verified; gamma, lam and min_rank are a "
        "reimplementation's",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"strategy.options gamma = {self.gamma}: must be in (0, 1]")
        if not (math.isfinite(self.lam) and self.lam >= 0):
            raise ConfigError(f"strategy.options lam = {self.lam}: must be finite and >= 0")
        if self.min_rank < 1:
            raise ConfigError(f"strategy.options min_rank = {self.min_rank}: must be >= 1")

    @property
    def needs_all_directions(self) -> str:
        return "prunes ranks from the last one on"

    def weights(self, layer: Layer) -> Sequence[float]:
        sizes = [norm(as_product(c.factors)) for c in layer.clients]
        total = sum(sizes)
        return [size / total for size in sizes] if total > 0 else layer.weights

    def merge(self, layer: Layer) -> Merged:
        s, rank = layer.start.scaling, layer.start.rank
        weights = self.weights(layer)
        padded = [resize(c.factors, rank, s) for c in layer.clients]
        A = weighted_sum(weights, (f.A for f in padded))
        B = weighted_sum(weights, (f.B for f in padded))
        return Merged(LoraFactors(A, B, s))

    def broadcast(self, state: State, client: ClientSpec) -> Broadcast:
        remembered = self.kept(state, RANK).get(str(client.partition_id))
        rank = client.rank if remembered is None else min(client.rank, int(remembered))
        given = super().broadcast(state, replace(client, rank=rank))
        start = self.pruned(rank)
        return replace(given, tail=RankRegularizer(weight=self.lam, start=start)) if start < rank else given

    def aggregate(
        self, state: State, updates: Iterable[ClientUpdate], *, diagnostics: bool = True
    ) -> tuple[State, Diagnostics | None]:
        received = list(updates)
        after, measured = super().aggregate(state, received, diagnostics=diagnostics)
        ranks: Tensors = self.kept(state, RANK)
        for update in received:
            start = self.pruned(_rank(update))
            if update.weight > 0 and tail_shrank(state, update, start):
                dtype = as_lora(next(iter(state.adapters.values()))).A.dtype
                ranks[str(update.partition_id)] = torch.tensor(float(start), dtype=dtype)
        remembered = {f"{RANK}/{partition}": ranks[partition] for partition in sorted(ranks, key=int)}
        return replace(after, memory={**after.memory, **remembered}), measured

    def pruned(self, rank: int) -> int:
        """The rank after a pruning: ``max(min_rank, floor(gamma rank))``, never more than before."""
        return min(rank, max(self.min_rank, math.floor(self.gamma * rank + 1e-9)))


def tail_shrank(state: State, update: ClientUpdate, start: int) -> bool:
    """Whether a client's tail from ``start`` on is smaller than that of the adapter it was sent."""
    before = after = 0.0
    for name, given in lora_set(update.adapters).items():
        sent = resize(as_lora(state.adapters[name]), given.rank, given.scaling)
        before, after = before + tail(sent, start), after + tail(given, start)
    return after < before


def tail(factors: LoraFactors, start: int) -> float:
    """``||B[:, start:]||_F ||A[start:, :]||_F``, 0 where nothing is left."""
    A, B = factors.A[start:].double(), factors.B[:, start:].double()
    return float(torch.linalg.vector_norm(B) * torch.linalg.vector_norm(A))


def _rank(update: ClientUpdate) -> int:
    return next(iter(update.adapters.values())).rank
