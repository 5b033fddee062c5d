"""Clients at work in a buffered round, and the Grid that says when each will be done."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import Message

from fedlora.core.state import InFlight
from strategies.request import PendingRequest


class EventGrid(Protocol):
    """Grid in simulated time that says when each client's reply will come.

    Attributes:
        seconds: now.
    """

    seconds: float

    def due(self, partition_id: int, message: Message, bytes_up: int) -> tuple[float, str]:
        """Seconds from the order to its reply, and why it is lost (empty: it is not)."""
        ...

    def compute(self, messages: Sequence[Message], *, lost: set[int], timeout: float) -> list[Message]:
        """Replies to the messages in no time; those of lost partitions are dropped."""
        ...

    def close_round(
        self, server_round: int, arrivals: Mapping[int, float], staleness: Mapping[int, int]
    ) -> None:
        """Note what a round was made of; arrivals in seconds since the start of the run."""
        ...


@dataclass
class Work:
    """A round under way.

    Attributes:
        present: node by partition of who is there.
        settings: of the instructions.
        last: no round will come after it.
        flights: those at work by their number.
        queue: when who arrives, and its number.
        buffer: what has arrived.
        started: in this round, by partition, as it started.
        trained: partitions of them that have trained, or will not.
    """

    present: Mapping[int, int]
    settings: Mapping[str, Any]
    last: bool
    flights: dict[int, InFlight] = field(default_factory=dict)
    queue: list[tuple[float, int]] = field(default_factory=list)
    buffer: list[InFlight] = field(default_factory=list)
    started: dict[int, tuple[PendingRequest, InFlight]] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)

    def push(self, flight: InFlight) -> None:
        """Somebody is at work."""
        self.flights[flight.number] = flight
        heapq.heappush(self.queue, (flight.arrives, flight.number))

    def pop(self) -> InFlight:
        """Who arrives next."""
        return self.flights.pop(heapq.heappop(self.queue)[1])

    def replace(self, flight: InFlight, other: InFlight) -> None:
        """Put another in a flight's place."""
        if flight.number in self.flights:
            self.flights[flight.number] = other
        self.buffer = [other if f.number == flight.number else f for f in self.buffer]
