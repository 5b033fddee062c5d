"""Sampling of clients: partitions, never node ids, from a seeded stream.

The numbers are Flower's: ``max(min_nodes, int(fraction * connected))``, and a fraction of 0 asks nobody.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from fedlora.core.seeding import stream
from fedlora.errors import ConfigError, RunFailed


@dataclass(slots=True, kw_only=True)
class Selection:
    """Selection of who trains and evaluates in a round, and how often each client was asked to train.

    Attributes:
        fraction_train: share of the clients that may train, in [0, 1]; 0 trains nobody.
        min_train_nodes: a round for fewer clients raises `RunFailed`.
        fraction_evaluate: share of the clients that evaluate, in [0, 1]; None: those that trained.
        min_evaluate_nodes: at least so many evaluate, of as many as there are.
        seed: root of the draws.
        partitions: those that may take part; None means all that are connected.
        max_participations: rounds that one client may be asked for; 0 means any number.
        participations: partition id -> rounds that it was asked for.
        separation: rounds from one in which a client is asked to the next one, at least.
        asked: partition id -> the round it was last asked for, where the separation is above 1.
    """

    fraction_train: float = 1.0
    min_train_nodes: int = 1
    fraction_evaluate: float | None = 1.0
    min_evaluate_nodes: int = 1
    seed: int = 0
    partitions: Collection[int] | None = None
    max_participations: int = 0
    participations: dict[int, int] = field(default_factory=dict)
    separation: int = 1
    asked: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("fraction_train", "fraction_evaluate"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{key} = {value}: must be in [0, 1]")
        for key in ("min_train_nodes", "min_evaluate_nodes"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} = {getattr(self, key)}: must be >= 0")

    def __str__(self) -> str:
        evaluate = "the same clients" if self.fraction_evaluate is None else f"{self.fraction_evaluate:.2f}"
        least = f"train {self.min_train_nodes}, evaluate {self.min_evaluate_nodes}"
        return f"fraction: train {self.fraction_train:.2f}, evaluate {evaluate}; minimum nodes: {least}"

    def choose(self, connected: Iterable[int], server_round: int) -> list[int]:
        """The sorted partition ids of one round; each is counted as asked.

        Their number goes by all that are connected and may train; drawn from are those that have rested.

        Raises:
            RunFailed: fewer than ``min_train_nodes`` may train.
        """
        whole = [partition for partition in connected if self.may_train(partition)]
        allowed = [partition for partition in whole if self._has_rested(partition, server_round)]
        if len(allowed) < self.min_train_nodes:
            raise RunFailed(
                f"round {server_round}: {len(allowed)} clients may train, "
                f"min-train-nodes = {self.min_train_nodes}"
            )
        chosen = sample_partitions(
            allowed, self.fraction_train, self.min_train_nodes, self.seed, server_round, of=len(whole)
        )
        for partition in chosen:
            self.count(partition)
            if self.separation > 1:
                self.asked[partition] = server_round
        return chosen

    def count(self, partition: int) -> None:
        """Count a client as asked."""
        self.participations[partition] = self.participations.get(partition, 0) + 1

    def evaluators(self, connected: Iterable[int], server_round: int) -> list[int]:
        """The sorted partition ids that evaluate a round, drawn apart from those that train."""
        allowed = [p for p in connected if self.partitions is None or p in self.partitions]
        share, least = self.fraction_evaluate or 0.0, self.min_evaluate_nodes
        return sample_partitions(allowed, share, least, self.seed, server_round, "evaluating")

    def may_train(self, partition: int) -> bool:
        """Whether a partition takes part and may be asked once more."""
        if self.partitions is not None and partition not in self.partitions:
            return False
        most = self.max_participations
        return most == 0 or self.participations.get(partition, 0) < most

    def _has_rested(self, partition: int, server_round: int) -> bool:
        return partition not in self.asked or server_round - self.asked[partition] >= self.separation


def clients_of_round(fraction: float, clients: int, minimum: int = 1) -> int:
    """Number of clients that a round asks: ``max(minimum, floor(fraction * clients))``.

    >>> clients_of_round(0.3, 10), clients_of_round(0.29, 10), clients_of_round(0.01, 10)
    (3, 2, 1)
    """
    return max(minimum, int(fraction * clients + 1e-9))


def sample_partitions(
    available: Iterable[int], fraction: float, minimum: int, seed: int, server_round: int,
    purpose: str = "sampling", of: int | None = None,
) -> list[int]:  # fmt: skip
    """The sorted partition ids of one round: `clients_of_round` of n, out of the available.

    n is ``of``, or the number of the available.

    The draw depends on the seed, the purpose, the round and the set of available partitions only.

    >>> sample_partitions(range(10), 0.3, 1, seed=0, server_round=1)
    [2, 4, 6]
    """
    everyone = sorted(available)
    n = len(everyone) if of is None else of
    count = min(len(everyone), clients_of_round(fraction, n, minimum))
    shuffled = stream(seed, purpose, server_round).permutation(len(everyone))
    return sorted(everyone[i] for i in shuffled[:count])
