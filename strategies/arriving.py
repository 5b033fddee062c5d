"""Buffered asynchronous rounds in real time: updates are taken as they arrive.

As in `strategies.buffered`, but nobody says beforehand when a reply will come. The server asks the Grid again
and again; a client without a reply after ``timeout`` seconds loses its place, not its update, which counts
whenever it comes, with the weight of its staleness. Until then, or until the Grid says that its node has
gone, it is not asked anew. A round ends with a full buffer, or after ``timeout`` seconds with what there is.

What the clients do is not reproducible, and what is on its way when the server stops is lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from logging import INFO
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora.core.seeding import stream
from fedlora.core.state import InFlight
from strategies.buffered import check_buffer
from strategies.late import LateStrategy
from strategies.loop import settings_of
from strategies.overdue import Overdue
from strategies.report import RoundReport
from strategies.request import PendingRequest, says_missing


@dataclass(slots=True)
class Pending:
    """One client at work.

    Attributes:
        request: to it.
        flight: when and from what it started; ``ordered`` on this process's clock.
        settings: of its instruction.
        messages: ids of those that it has not answered.
        overdue: it has lost its place.
    """

    request: PendingRequest
    flight: InFlight
    settings: dict[str, Any]
    messages: set[str]
    overdue: bool = False


class ArrivingStrategy(LateStrategy):
    """Strategy of a rule whose rounds are aggregations of what has arrived.

    Args:
        arguments, named: as of `LateStrategy`.
        in_flight: clients at work at a time.
        buffer_size: updates that make an aggregation.
        poll_seconds: between two questions for replies.

    Raises:
        NotApplicable: a rule that cannot take late updates.
        ConfigError: fewer clients in flight than the buffer holds.
    """

    def __init__(
        self, *arguments: Any, in_flight: int, buffer_size: int, poll_seconds: float = 0.25, **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        check_buffer(in_flight, buffer_size)
        self.in_flight, self.buffer_size, self.poll_seconds = in_flight, buffer_size, poll_seconds
        self.pending: dict[int, Pending] = {}
        self.arrived: list[InFlight] = []

    def train_round(
        self, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, server_round: int, last: int,
        timeout: float,
    ) -> ArrayRecord:  # fmt: skip
        """Start clients and take what arrives until the buffer is full, or for ``timeout`` seconds.

        Raises:
            RunFailed: too few clients connected, or too few valid updates in the buffer.
        """
        assert self.state is not None
        self._take(arrays)
        self.report = RoundReport(server_round=server_round)
        self.transport.open(self.state.base, [pending.request for pending in self.pending.values()])
        settings, ends = settings_of(config, server_round), math.inf
        while len(self.arrived) < self.buffer_size and time.monotonic() < ends:
            left = self.buffer_size - len(self.arrived)
            self._fill_places(grid, settings, self.in_flight if server_round < last else left)
            ends = min(ends, time.monotonic() + timeout)  # from the first order on, not from who is asked who
            before = len(self.arrived)
            self._take_arrived(grid)
            self._give_up(timeout)
            if len(self.arrived) == before:
                time.sleep(self.poll_seconds)
        buffer, self.arrived = self.arrived[: self.buffer_size], self.arrived[self.buffer_size :]
        self._count_bytes()
        for request in self.transport.requests:
            request.bytes_up = request.bytes_down = 0
        self.report.staleness = {f.partition_id: self.state.round - f.version for f in buffer}
        self._aggregate(buffer)
        log(INFO, "%s in the buffer, %s at work", len(buffer), len(self.pending))
        self._released = self.arrays()
        return self._released

    def _note_late(self, grid: Grid, overdue: Overdue) -> None:
        """Nothing: late replies are taken."""

    def _fill_places(self, grid: Grid, settings: dict[str, Any], most: int) -> None:
        """Start clients that are connected and free, until so many are at work that have a place."""
        places = most - sum(not pending.overdue for pending in self.pending.values())
        if places <= 0:
            return
        present = self._present(grid, self.selection.min_train_nodes)
        self.report.refuse(self.node_directory.refused)
        busy = {*self.pending, *(flight.partition_id for flight in self.arrived)}
        free = [p for p in present if p not in busy and self.selection.may_train(p)]
        rng = stream(self.seed, "starting", self.report.server_round, len(self.transport.requests))
        order = rng.permutation(len(free))
        for partition in np.array(free, dtype=np.int64)[order[:places]].tolist():
            self._send(grid, partition, present[partition], settings)

    def _send(self, grid: Grid, partition: int, node: int, settings: dict[str, Any]) -> None:
        assert self.state is not None
        self.selection.count(partition)
        request = self.transport.add(partition, node, self._broadcast(partition))
        message = self.transport.message(request, MessageType.TRAIN, settings)
        flight = InFlight(partition, self.state.round, 0.0, 0, ordered=time.monotonic())
        self.pending[partition] = Pending(request, flight, settings, _pushed(grid, [message]))

    def _take_arrived(self, grid: Grid) -> None:
        """Read what has come; who has nothing on its way any more may be asked anew."""
        waiting = {m: pending for pending in self.pending.values() for m in pending.messages}
        for reply in grid.pull_messages(waiting) if waiting else []:
            pending = waiting.get(reply.metadata.reply_to_message_id)
            if pending is None:
                continue
            pending.messages.discard(reply.metadata.reply_to_message_id)
            if says_missing(reply):
                fuller = self.transport.fuller([reply], MessageType.TRAIN, pending.settings)
                pending.messages |= _pushed(grid, fuller)
            else:
                self._read(reply, pending)
        done = [partition for partition, pending in self.pending.items() if not pending.messages]
        for partition in done:
            del self.pending[partition]

    def _read(self, reply: Message, pending: Pending) -> None:
        """Take the update of a reply, or say why it is of no use."""
        partition = pending.request.partition_id
        self.transport.settle([reply])
        flight = self._brought_by(pending.request, pending.flight)
        if why := flight.refused or self._too_old(flight):
            self.report.refuse({partition: why})
            return
        if pending.overdue:
            seconds = time.monotonic() - flight.ordered
            self.report.late[partition] = (
                f"its reply to round {flight.version + 1} came after {seconds:.0f} s"
            )
        self.arrived.append(flight)

    def _give_up(self, timeout: float) -> None:
        """Free the places of those that have been at work for longer than ``timeout`` seconds."""
        for partition, pending in self.pending.items():
            if not pending.overdue and time.monotonic() - pending.flight.ordered >= timeout:
                pending.overdue = True
                self.report.refuse({partition: f"no reply after {timeout:g} s; it counts when it comes"})


def _pushed(grid: Grid, messages: Sequence[Message]) -> set[str]:
    """Ids of the messages that were sent."""
    return {identifier for identifier in grid.push_messages(messages) if identifier}
