"""Clients at work in a round that does not wait, and the Grid that says when each will be done."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedlora.core.state import InFlight
from strategies.request import PendingRequest

DRAWS = 64
"""Draws of somebody free before all are looked at."""


class EventGrid(Protocol):
    """Grid in simulated time that says when each client's reply will come.

    Attributes:
        seconds: now.
        node_of: node by partition.
    """

    seconds: float
    node_of: Mapping[int, int]

    def there(self) -> NDArray[np.int64]:
        """The partitions that are there for the round to come, sorted; time passes while they are too few."""
        ...

    def tiers(self, count: int) -> NDArray[np.int64]:
        """Tier of each partition out of ``count``, 0 the fastest; -1 for those that take no part."""
        ...

    def due(self, partition_id: int, server_round: int, bytes_down: int, bytes_up: int) -> tuple[float, str]:
        """Seconds from the order to its reply, and why it is lost (empty: it is not)."""
        ...

    def compute(self, messages: Sequence[Message], *, lost: set[int], timeout: float) -> list[Message]:
        """Replies to the messages in no time; those of lost partitions are dropped."""
        ...

    def close_round(self, server_round: int, version: int, used: Sequence[InFlight]) -> None:
        """Note what a round was made of, and the version of the model that its aggregation is added to."""
        ...


@dataclass
class AtWork:
    """A round under way.

    Attributes:
        present: partitions of who is there, sorted.
        settings: of the instructions.
        last: no round will come after it.
        flights: those at work by their number.
        queue: when who arrives, and its number.
        buffer: what has arrived.
        started: in this round, by partition, as it started.
        trained: partitions of them that have trained, or will not.
        busy: partitions with something on its way, or that had in this round.
    """

    present: NDArray[np.int64]
    settings: Mapping[str, Any]
    last: bool
    flights: dict[int, InFlight] = field(default_factory=dict)
    queue: list[tuple[float, int]] = field(default_factory=list)
    buffer: list[InFlight] = field(default_factory=list)
    started: dict[int, tuple[PendingRequest, InFlight]] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)
    busy: set[int] = field(default_factory=set)

    def push(self, flight: InFlight) -> None:
        """Somebody is at work."""
        self.flights[flight.number] = flight
        self.busy.add(flight.partition_id)
        heapq.heappush(self.queue, (flight.arrives, flight.number))

    def pop(self) -> InFlight:
        """Who arrives next."""
        return self.take(heapq.heappop(self.queue)[1])

    def take(self, number: int) -> InFlight:
        """Whoever has arrived, out of those at work."""
        return self.flights.pop(number)

    def free(
        self, among: NDArray[np.int64], may_train: Callable[[int], bool], rng: np.random.Generator
    ) -> int | None:
        """One of these that has nothing on its way and may train; None: there is nobody.

        Whoever is drawn and not free is drawn anew, so that a large population is not looked through.
        """
        for _ in range(DRAWS if len(among) > DRAWS else 0):
            drawn = int(among[rng.integers(len(among))])
            if drawn not in self.busy and may_train(drawn):
                return drawn
        free = [p for p in among.tolist() if p not in self.busy and may_train(p)]
        return free[int(rng.integers(len(free)))] if free else None

    def drop(self, flight: InFlight) -> None:
        """What has arrived is of no use; who did not start in this round may start again."""
        if flight.partition_id not in self.started:
            self.busy.discard(flight.partition_id)

    def replace(self, flight: InFlight, other: InFlight) -> None:
        """Put another in a flight's place."""
        if flight.number in self.flights:
            self.flights[flight.number] = other
        self.buffer = [other if f.number == flight.number else f for f in self.buffer]
