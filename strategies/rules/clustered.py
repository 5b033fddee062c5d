"""Clusters of clients by how like their B are, an adapter for each: the clustering step of FedLEASE.

Wang, Bian et al., "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning", NeurIPS 2025
(arXiv 2509.15087); the released code was read, of the paper the abstract alone.

    warm-up:  each client goes on from its own (A_k, B_k)
    then:     d(j, k) = mean over layers of 1 - cos(B_j, B_k),    clusters by average linkage,
              as many as have the largest mean silhouette, from 2 to ``most_clusters``
    round:    A_c = sum_{k in c} p_k A_k / sum_{k in c} p_k,    B_c alike;    client k goes on from (A_c, B_c)

The clusters are made once, after ``warmup_rounds``. A client that first replies later begins from the mean of
all, and joins the cluster whose B is nearest to its own; a cluster of which nobody replies stays as it is.

Not here: FedLEASE's experts. There each client holds the adapters of all clusters, trains its own cluster's
and a router that mixes the best of them for each token. So this is averaging within clusters, one adapter a
client; it costs the uplink and downlink of FedAvg, where experts cost one download for each cluster.

There is no global model, so no aggregation is exact and the diagnostics measure nothing of it: for the server
the adapter is the mean of what came back, a model for whom nobody trained. The head is averaged over all
clients; the released code keeps it at each client, which is ``model.head = "local"``. A run ends with an
adapter for each client, ``adapters/client-K/``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedlora.core.adapters import as_lora, lora_set
from fedlora.core.factors import AdapterSet, LoraFactors, Tensors
from fedlora.core.state import Broadcast, ClientSpec, ClientUpdate, State
from fedlora.errors import ConfigError
from strategies.diagnostics import Diagnostics
from strategies.facts import Facts
from strategies.layer import Layer, Merged, mean_a, mean_b, weighted_sum
from strategies.rule import Rule

CLUSTER, OF = "cluster", "cluster-of"
"""Owners in `State.memory`: ``cluster/<number>/<layer>.A``, and ``cluster-of/<partition id>``, a number."""

ROUNDING = 1e-12
"""Distances below it are none: equal B may differ by the last bit of their norms."""


@dataclass(frozen=True, kw_only=True)
class ClusteredRule(Rule):
    """An adapter for each cluster of clients, averaged within it.

    Attributes:
        warmup_rounds: rounds in which each client trains alone, >= 1.
        most_clusters: of them there are at most so many, >= 2.
    """

    warmup_rounds: int = 1
    most_clusters: int = 10

    facts: ClassVar[Facts] = Facts(
        name="clustered",
        title="Clusters by B (after FedLEASE)",
        paper="Wang et al., NeurIPS 2025, arXiv 2509.15087",
        by_client=True,
        exact=False,
        mean=False,
        stale="an update belongs to the cluster of its round",
        secure_sum=False,
        up="r(o+i)",
        down="r(o+i)",
        deviation="FedLEASE's clusters without its experts and router, an adapter for each client; clients "
        "count by their examples, in the released code alike; one cluster where no silhouette is above 0; "
        "warm-up is 1 round, in the released code 5",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("warmup_rounds", 1), ("most_clusters", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"strategy.options {name} = {getattr(self, name)}: must be >= {least}")

    @property
    def needs_all_layers(self) -> str:
        return "tells clients apart by the B of all layers"

    def merge(self, layer: Layer) -> Merged:
        return Merged(LoraFactors(mean_a(layer), mean_b(layer), layer.start.scaling))

    def broadcast(self, state: State, client: ClientSpec) -> Broadcast:
        number = self.kept(state, OF).get(str(client.partition_id))
        if number is None:
            return super().broadcast(state, client)
        return super().broadcast(replace(state, adapters=self.of_cluster(state, int(number))), client)

    def of_cluster(self, state: State, number: int) -> AdapterSet:
        """Adapter of a cluster, at the global scaling."""
        kept = self.kept(state, f"{CLUSTER}/{number}")
        return {
            name: replace(as_lora(adapter), A=kept[f"{name}.A"], B=kept[f"{name}.B"])
            for name, adapter in state.adapters.items()
        }

    def aggregate(
        self, state: State, updates: Iterable[ClientUpdate], *, diagnostics: bool = True
    ) -> tuple[State, Diagnostics | None]:
        received = sorted(updates, key=lambda update: update.partition_id)
        after, measured = super().aggregate(state, received, diagnostics=diagnostics)
        counted = self.choose([update for update in received if update.weight > 0])
        own = {update.partition_id: at_scaling(update, state) for update in counted}
        weights = {update.partition_id: update.weight for update in counted}
        before = {int(partition): int(number) for partition, number in self.kept(state, OF).items()}
        clusters = {number: self.of_cluster(state, number) for number in set(before.values())}
        if after.round <= self.warmup_rounds:
            members = before | {partition: partition for partition in own}
        else:
            members = before | {p: nearest(a, clusters) for p, a in own.items() if p not in before}
        clusters |= averaged(members, own, weights)
        if after.round == self.warmup_rounds:
            alone = {partition: clusters[number] for partition, number in sorted(members.items())}
            found = cluster(distances(list(alone.values())), self.most_clusters)
            members = dict(zip(alone, found, strict=True))
            clusters = averaged(members, alone, {p: weights.get(p, 1.0) for p in alone})
        return replace(after, memory={**after.memory, **remembered(members, clusters)}), measured


def at_scaling(update: ClientUpdate, state: State) -> AdapterSet:
    """A client's factors with the global scaling, its own folded into B."""
    scaling = {name: as_lora(adapter).scaling for name, adapter in state.adapters.items()}
    return {
        name: replace(
            f,
            B=f.B if f.scaling == scaling[name] else (f.scaling / scaling[name]) * f.B,
            scaling=scaling[name],
        )
        for name, f in lora_set(update.adapters).items()
    }


def averaged(
    members: Mapping[int, int], own: Mapping[int, AdapterSet], weights: Mapping[int, float]
) -> dict[int, AdapterSet]:
    """Cluster -> the weighted mean of those of its clients that are there; no cluster of which nobody is."""
    groups: dict[int, list[int]] = defaultdict(list)
    for partition in sorted(own):
        groups[members[partition]].append(partition)
    return {
        number: _mean([own[p] for p in group], [weights[p] for p in group])
        for number, group in groups.items()
    }


def _mean(adapters: Sequence[AdapterSet], weights: Sequence[float]) -> AdapterSet:
    shares = [weight / sum(weights) for weight in weights]
    return {
        name: replace(
            first,
            A=weighted_sum(shares, (a[name].A for a in adapters)),
            B=weighted_sum(shares, (a[name].B for a in adapters)),
        )
        for name, first in adapters[0].items()
    }


def remembered(members: Mapping[int, int], clusters: Mapping[int, AdapterSet]) -> Tensors:
    """Clusters as they are in `State.memory`."""
    first = next(iter(next(iter(clusters.values())).values())).A
    kept: Tensors = {
        f"{OF}/{p}": torch.tensor(float(n), dtype=first.dtype) for p, n in sorted(members.items())
    }
    for number, adapters in sorted(clusters.items()):
        for name, factors in adapters.items():
            kept |= {f"{CLUSTER}/{number}/{name}.A": factors.A, f"{CLUSTER}/{number}/{name}.B": factors.B}
    return kept


def nearest(adapters: AdapterSet, clusters: Mapping[int, AdapterSet]) -> int:
    """The cluster whose B is nearest; the first of several."""
    away = {number: float(distances([adapters, other])[0, 1]) for number, other in sorted(clusters.items())}
    return min(away, key=lambda number: away[number])


def distances(adapters: Sequence[AdapterSet]) -> np.ndarray:
    """``mean over layers of 1 - cos(B_j, B_k)``, (clients, clients), float64; 1 to a B of zeros."""
    total = np.zeros((len(adapters), len(adapters)))
    for name in adapters[0]:
        rows: Tensor = torch.stack([a[name].B.double().flatten() for a in adapters])
        unit = torch.nn.functional.normalize(rows, dim=1)
        total += 1.0 - (unit @ unit.T).numpy()
    total /= len(adapters[0])
    total = (total + total.T) / 2
    return np.where((total < ROUNDING) | np.eye(len(adapters), dtype=bool), 0.0, total)


def cluster(away: np.ndarray, most: int) -> list[int]:
    """A number from 0 for each client, by average linkage, at the largest mean silhouette that is above 0."""
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    count = len(away)
    if count < 3:
        return [0] * count
    tree = linkage(squareform(away, checks=False), "average")
    best, found = 0.0, [0] * count
    for number in range(2, min(most, count - 1) + 1):
        labels = cut_tree(tree, n_clusters=[number])[:, 0]
        if (score := silhouette(away, labels)) > best:
            best, found = score, [int(label) for label in labels]
    return found


def silhouette(away: np.ndarray, labels: np.ndarray) -> float:
    """The mean of ``(b - a) / max(a, b)``; a to the client's own cluster, b to the next; 0 of one alone."""
    inside = np.eye(labels.max() + 1)[labels]
    sums, sizes = away @ inside, inside.sum(axis=0)
    own = sizes[labels]
    a = sums[np.arange(len(labels)), labels] / np.maximum(own - 1, 1)
    b = np.where(inside > 0, np.inf, sums / sizes).min(axis=1)
    larger = np.maximum(a, b)
    return float(np.where((own > 1) & (larger > 0), (b - a) / np.where(larger > 0, larger, 1.0), 0.0).mean())
