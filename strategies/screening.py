"""Screening of a round's updates beside each other, before a rule sees them: way, weight, finite aggregate.

With m updates of weights w_k (claimed examples), and n_k the root mean square of what the shipped tensors of
client k changed from its start, head included (a client of larger rank has more of them):

    n_k <= c_n  median_j n_j                    (`max_relative_norm` = c_n; else refused)
    g_k = w_k max(1, n_k / median_j n_j)        its pull
    g_k <= c_w / m  sum_j g_j                   (`largest_share` = c_w; w_k is cut until it holds)

Both bounds leave a round alone in which nobody is beyond them, bit for bit; the second never acts on equal
weights while c_n <= c_w. A median means something from three updates on. They end what one client can do by
claims and by scale; one that stays within them and steers patiently, for instance to a backdoor, is not
recognised (docs/security.md).

A bound on ||s_k B_k A_k - s B A|| in place of n_k was tried: with SGD honest clients are up to ten medians
apart there, and no attack was found that it stops and the bound on the tensors does not.

Not for client-level privacy: who is left out here depends on others, which noise on a sum does not cover.
There every update is clipped and weighs alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from fedlora.core.factors import LoraFactors, resize
from fedlora.core.state import Broadcast, ClientUpdate, State
from fedlora.errors import ConfigError, RunFailed
from strategies.diagnostics import Diagnostics

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]
FEWEST = 3
"""Updates of a round from which on one of them cannot move the median beyond what another one did."""
Aggregate = Callable[[Sequence[ClientUpdate]], tuple[State, Diagnostics | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """Bounds on one client's part in a round.

    Attributes:
        largest_share: c_w, in equal shares 1/m; 0 takes claimed weights as they are.
        max_relative_norm: c_n, in medians of the round; 0 refuses nobody for it.

    Raises:
        ConfigError: a number that is neither 0 nor at least 1.
    """

    largest_share: float = 2.0
    max_relative_norm: float = 2.0

    def __post_init__(self) -> None:
        for key in ("largest_share", "max_relative_norm"):
            value = getattr(self, key)
            if not (value == 0 or 1 <= value < math.inf):
                raise ConfigError(f"strategy.{key.replace('_', '-')} = {value}: must be 0 or at least 1")

    def __str__(self) -> str:
        share, most = self.largest_share, self.max_relative_norm
        weights = f"a client pulls at most {share:g} equal shares" if share else "claimed weights count"
        return f"{weights}; " + (
            f"an update beyond {most:g} medians of its round is refused" if most else "updates of any length"
        )

    def screened(
        self, updates: Sequence[ClientUpdate], starts: Mapping[int, Broadcast]
    ) -> tuple[list[ClientUpdate], dict[int, str]]:
        """The updates that count, their weights bounded, and the others with the reason of each.

        Args:
            updates: valid ones.
            starts: what each of them started from, by partition.
        """
        refused = dict[int, str]()
        ways = {update.partition_id: way(update, starts[update.partition_id]) for update in updates}
        usual = median(ways.values()) if len(updates) >= FEWEST else 0.0
        times = {partition: moved / usual if usual > 0 else 1.0 for partition, moved in ways.items()}
        for partition, ratio in times.items():
            if 0 < self.max_relative_norm < ratio:
                refused[partition] = (
                    f"moved {ratio:.3g} times as far as the round's median, "
                    f"strategy.max-relative-norm = {self.max_relative_norm:g}"
                )
        kept = [update for update in updates if update.partition_id not in refused]
        pulls = [update.weight * max(1.0, times[update.partition_id]) for update in kept]
        bounds = self.bounded(pulls)
        return [
            u if pull <= bound else replace(u, weight=u.weight * bound / pull)
            for u, pull, bound in zip(kept, pulls, bounds, strict=True)
        ], refused

    def bounded(self, pulls: Sequence[float]) -> list[float]:
        """The pulls, none above its largest share of the sum of what is returned.

        The heaviest are cut one after another, until the next is within ``c_w / m`` of the whole.

        >>> Screening(largest_share=2.0).bounded([1.0, 1.0, 1.0, 97.0])
        [1.0, 1.0, 1.0, 3.0]
        """
        cut, share = list(pulls), self.largest_share / max(len(pulls), 1)
        if not 0 < share < 1:
            return cut
        heaviest = sorted(range(len(cut)), key=lambda k: -cut[k])
        for count in range(1, len(cut) + 1):
            above, rest = heaviest[:count], heaviest[count:]
            left = 1 - share * count
            bound = share * sum(cut[k] for k in rest) / left if left > 0 else 0.0
            if bound <= 0:  # those that are left weigh nothing: no share of them bounds anybody
                return [min(w, cut[above[-1]]) for w in cut]
            if count == 1 and pulls[above[0]] <= bound:
                return cut
            if pulls[rest[0]] <= bound:
                return [bound if k in above else w for k, w in enumerate(cut)]
        return cut


def way(update: ClientUpdate, start: Broadcast) -> float:
    """Root mean square of what an update's shipped tensors changed, head included."""
    moved = [update.head[name].double() - start.head[name].double() for name in sorted(update.head)]
    for module in sorted(start.modules):
        begun, ended = start.adapters[module], update.adapters[module]
        if isinstance(begun, LoraFactors) and begun.rank != ended.rank:  # a model keeps its rank
            begun = resize(begun, ended.rank, ended.scaling)
        before, after = begun.tensors(), ended.tensors()
        moved += [
            after[name].double() - before[name].double() for name in sorted(start.uploaded & after.keys())
        ]
    count = sum(change.numel() for change in moved)
    return math.sqrt(sum(float(change.square().sum()) for change in moved) / max(count, 1))


@dataclass(frozen=True, slots=True)
class Aggregated:
    """A round's aggregate, and whose updates are in it.

    Attributes:
        updates: those that count, with the weights that they count with.
        refused: partition id -> why it does not count.
        state: after the round; None where too few updates are left.
        diagnostics: of the aggregation.
    """

    updates: list[ClientUpdate]
    refused: dict[int, str]
    state: State | None = None
    diagnostics: Diagnostics | None = None


def aggregate_screened(
    aggregate: Aggregate,
    updates: Sequence[ClientUpdate],
    starts: Mapping[int, Broadcast],
    screening: Screening | None,
    *,
    least: int,
    once: bool = False,
) -> Aggregated:
    """The aggregate of the updates that pass, which is finite.

    Where it is not, the update that is furthest from its start goes, until it is.

    Args:
        aggregate: the round, from updates.
        updates: valid ones.
        starts: what each of them started from, by partition.
        screening: bounds that compare them; None: only the aggregate decides.
        least: with fewer updates than these nothing is aggregated.
        once: the aggregate draws noise for privacy, of which a round has one draw: all updates are in it, or
            there is none. Who is left out, and a second draw, would be told by what no noise covers.

    Raises:
        RunFailed: an aggregate that is made once is not finite.
    """
    kept, refused = list(updates), dict[int, str]()
    if screening is not None:
        kept, refused = screening.screened(updates, starts)
    if not once and not any(update.weight for update in kept):
        refused |= {update.partition_id: "weighs nothing, as do all others" for update in kept}
        kept = []
    while len(kept) >= max(least, 1):
        try:
            state, measured = aggregate(kept)
            if _is_finite(state):
                return Aggregated(kept, refused, state, measured)
        except LinAlgError:  # a decomposition of what is not finite
            pass
        if once:
            raise RunFailed("the private aggregate holds a NaN or an infinity, and its noise serves once")
        furthest = max(kept, key=lambda u: way(u, starts[u.partition_id]))
        refused[furthest.partition_id] = "with it the aggregate would hold a NaN or an infinity"
        kept = [update for update in kept if update is not furthest]
    return Aggregated(kept, refused)


def _is_finite(state: State) -> bool:
    tensors = [t for adapter in state.adapters.values() for t in adapter.tensors().values()]
    tensors += [*state.head.values(), *state.memory.values()]
    tensors += state.base[-1].tensors().values() if state.base else []
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
