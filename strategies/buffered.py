"""Buffered asynchronous rounds: clients start and finish at their own time, and rounds do not wait.

FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639). M clients are at work; whoever finishes is replaced
by another at once, which starts from the global model of that moment. With K updates in the buffer

    x_{t+1} = aggregate(x_t, { s(tau_k) Delta_k }),    s(tau) = 1 / sqrt(1 + tau),    tau_k = t - t_k

where Delta_k is what client k changed since the version t_k that it started from. What a change is follows
from the rule (`Facts.stale`): of factors, it is added to the factors of now; of products, s_k B_k A_k itself,
which goes into the base. With tau = 0 an update is taken as it came.

Notation: M is ``in_flight``, K is ``buffer_size``. The Grid says who finishes when, in simulated time.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace
from logging import INFO, WARNING
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora.core.adapters import LayerAdapter, as_lora
from fedlora.core.factors import Tensors
from fedlora.core.seeding import stream
from fedlora.core.state import Broadcast, ClientUpdate, InFlight, ServerState
from fedlora.errors import ConfigError, FactorShapeError, NotApplicable, RunFailed, UpdateRefused
from strategies.flower import FactorStrategy
from strategies.loop import settings_of
from strategies.precision import rounded_broadcast, rounded_state
from strategies.replies import TRAIN_LOSS
from strategies.report import RoundReport
from strategies.request import PendingRequest

FACTORS, PRODUCT = "factors", "product"
"""What of a late update is added: see `Facts.stale`."""


class EventGrid(Protocol):
    """Grid in simulated time that says when each client's reply will come.

    Attributes:
        seconds: now.
    """

    seconds: float

    def due(self, partition_id: int, message: Message, bytes_up: int) -> tuple[float, str]:
        """Seconds from the order to its reply, and why it is lost (empty: it is not)."""
        ...

    def compute(self, messages: list[Message], lost: set[int], timeout: float) -> list[Message]:
        """Replies to the messages in no time; those of lost partitions are dropped."""
        ...

    def close_round(
        self, server_round: int, arrivals: Mapping[int, float], staleness: Mapping[int, int]
    ) -> None:
        """Note what a round was made of; arrivals in seconds since the start of the run."""
        ...


class BufferedStrategy(FactorStrategy):
    """Strategy of a rule whose rounds are aggregations of a buffer.

    Args:
        arguments, named: as of `FactorStrategy`.
        in_flight: clients at work at a time, M.
        buffer_size: updates that make an aggregation, K.
        max_staleness: an older update is dropped; 0 drops none for that.
        discount: s(tau) falls with the root; otherwise it is 1.

    Raises:
        ConfigError: a rule that cannot take late updates, or fewer clients in flight than the buffer holds.
    """

    def __init__(
        self,
        *arguments: Any,
        in_flight: int,
        buffer_size: int,
        max_staleness: int = 0,
        discount: bool = True,
        **named: Any,
    ) -> None:
        super().__init__(*arguments, **named)
        check_buffer(self.rule.facts.name, self.rule.facts.stale, in_flight, buffer_size)
        self.in_flight, self.buffer_size = in_flight, buffer_size
        self.max_staleness, self.discount = max_staleness, discount
        self.flights: list[InFlight] = []

    def snapshot(self) -> ServerState:
        """State with the clients at work."""
        return replace(super().snapshot(), in_flight=tuple(self.flights))

    def restore(self, snapshot: ServerState) -> None:
        """Go on from a `snapshot`."""
        super().restore(snapshot)
        self.flights = list(snapshot.in_flight)

    def train_round(
        self, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, server_round: int, last: int,
        timeout: float,
    ) -> ArrayRecord:  # fmt: skip
        """Start clients and take their replies as they come, until the buffer is full; then aggregate.

        Where nobody is at work any more and nobody is free, it is aggregated as it is.

        Raises:
            RunFailed: nobody is at work and nobody is there to start, or no update of the buffer is valid.
        """
        clock: EventGrid = grid  # type: ignore[assignment]
        assert self.state is not None
        self._take(arrays)
        self.report = RoundReport(server_round=server_round)
        settings = settings_of(config, server_round)
        self.transport.open(self.state.base)
        present = self._present(grid, 1)
        queue = [(flight.arrives, flight.number, flight) for flight in self.flights]
        heapq.heapify(queue)
        started: dict[int, tuple[InFlight, Message]] = {}
        buffer: list[InFlight] = []
        while len(buffer) < self.buffer_size:
            while len(queue) < self.in_flight and (free := self._free(present, queue, buffer)):
                draws = stream(self.seed, "starting", server_round, len(started))
                partition = free[int(draws.integers(len(free)))]
                message = self._start(partition, present[partition], settings)
                seconds, why = clock.due(partition, message, self.transport.expected_bytes(partition))
                number = server_round * 1_000_000 + len(started)
                flight = InFlight(partition, self.state.round, clock.seconds + seconds, number, lost=why)
                started[partition] = flight, message
                heapq.heappush(queue, (flight.arrives, number, flight))
            if not queue:
                break
            _, _, flight = heapq.heappop(queue)
            clock.seconds = flight.arrives
            if flight.lost:
                self.report.refused[flight.partition_id] = flight.lost
            else:
                buffer.append(flight)
        log(INFO, "%s started, %s at work, %s in the buffer", len(started), len(queue), len(buffer))
        wanted = {f.partition_id for f in buffer} if server_round == last else started.keys()
        messages = [message for partition, (_, message) in started.items() if partition in wanted]
        lost = {partition for partition, (flight, _) in started.items() if flight.lost}
        replies = clock.compute(messages, lost, timeout)
        trained = self._trained(replies, {p: f for p, (f, _) in started.items()})
        self.flights = [trained.get(f.number, f) for _, _, f in sorted(queue)]
        self._aggregate(clock, [trained.get(f.number, f) for f in buffer], server_round)
        self._released = self.arrays()
        return self._released

    def _free(self, present: Mapping[int, int], queue: list[Any], buffer: list[InFlight]) -> list[int]:
        """Partitions that are there, have nothing on its way, and may train once more."""
        busy = {flight.partition_id for _, _, flight in queue} | {f.partition_id for f in buffer}
        busy |= {request.partition_id for request in self.transport.requests}
        return [p for p in present if p not in busy and self.selection.may_train(p)]

    def _start(self, partition_id: int, node_id: int, settings: Mapping[str, Any]) -> Message:
        assert self.state is not None
        self.selection.count(partition_id)
        broadcast = self._broadcast(partition_id)
        request = self.transport.add(partition_id, node_id, broadcast)
        return self.transport.message(request, MessageType.TRAIN, settings)

    def _broadcast(self, partition_id: int) -> Broadcast:
        assert self.state is not None
        broadcast = self.rule.broadcast(self.state, self.client_spec(partition_id))
        return rounded_broadcast(broadcast, self._dtype)

    def _trained(self, replies: list[Message], flights: Mapping[int, InFlight]) -> dict[int, InFlight]:
        """The flights whose clients have trained by their number, with what they bring or why they do not."""
        self.transport.settle(replies)
        self._count_bytes()
        found = {}
        for request in self.transport.requests:
            flight = flights[request.partition_id]
            if flight.lost:
                continue
            try:
                update = self._accept(request)
            except (UpdateRefused, FactorShapeError) as error:
                found[flight.number] = replace(flight, refused=str(error))
                continue
            self.report.note(request.partition_id, request.reply)
            self.transport.note_ledger(request)
            brought = self._brought(update, request.broadcast)
            found[flight.number] = replace(
                flight, tensors=brought, weight=update.weight, loss=_loss_of(request)
            )
        return found

    def _brought(self, update: ClientUpdate, start: Broadcast) -> Tensors:
        """What a late update is told by: changes in float64, or whole factors, by layer and name."""
        head = update.head.items()
        brought: Tensors = {f"/{name}": tensor.double() - start.head[name].double() for name, tensor in head}
        for module in sorted(start.modules):
            ends, begins = update.adapters[module].tensors(), start.adapters[module].tensors()
            if self.rule.facts.stale == PRODUCT:
                brought |= {f"{module}/{name}": end for name, end in ends.items()}
            else:
                changes = {name: ends[name].double() - begins[name].double() for name in start.uploaded}
                brought |= {f"{module}/{name}": change for name, change in changes.items()}
        return brought

    def _landed(self, flight: InFlight) -> ClientUpdate:
        """The update as the rule takes it now."""
        assert self.state is not None
        staleness = self.state.round - flight.version
        share = (1 + staleness) ** -0.5 if self.discount else 1.0
        start = self._broadcast(flight.partition_id)
        adapters: dict[str, LayerAdapter] = {}
        for module, adapter in start.adapters.items():
            values = adapter.tensors()
            own = {n: flight.tensors[key] for n in values if (key := f"{module}/{n}") in flight.tensors}
            if self.rule.facts.stale == PRODUCT:
                factors = as_lora(adapter.replaced(own))
                adapters[module] = replace(factors, B=share * factors.B)
            else:
                moved = {n: (values[n].double() + share * change).float() for n, change in own.items()}
                adapters[module] = adapter.replaced(moved)
        head = {
            name: (tensor.double() + share * flight.tensors[f"/{name}"]).to(tensor.dtype)
            for name, tensor in start.head.items()
        }
        return ClientUpdate(
            partition_id=flight.partition_id, adapters=adapters, head=head, weight=flight.weight
        )

    def _aggregate(self, clock: EventGrid, buffer: list[InFlight], server_round: int) -> None:
        assert self.state is not None
        staleness = {flight.partition_id: self.state.round - flight.version for flight in buffer}
        counted = []
        for flight in sorted(buffer, key=lambda flight: flight.partition_id):
            old = staleness[flight.partition_id]
            why = flight.refused
            if self.max_staleness and old > self.max_staleness:
                why = f"its update is {old} versions old, devices.max-staleness = {self.max_staleness}"
            if why:
                self.report.refused[flight.partition_id] = why
                log(WARNING, "\tpartition %s refused: %s", flight.partition_id, why)
            else:
                counted.append(flight)
        if len(counted) < max(1, self.selection.min_train_nodes):
            raise RunFailed(
                f"round {server_round}: {len(counted)} valid updates in the buffer, min-train-nodes = "
                f"{self.selection.min_train_nodes} ({self.report.refusals() or 'nobody is at work'})"
            )
        updates = [self._landed(flight) for flight in counted]
        state, self.report.diagnostics = self.rule.aggregate(
            self.state, updates, diagnostics=self.diagnostics
        )
        self.state = rounded_state(state, self._dtype)
        self.report.participants = [update.partition_id for update in updates]
        losses = [(f.weight, f.loss) for f in counted if f.loss is not None]
        total = sum(weight for weight, _ in losses)
        self.report.train_loss = sum(w * x for w, x in losses) / total if total else None
        clock.close_round(server_round, {f.partition_id: f.arrives for f in buffer}, staleness)


def check_buffer(name: str, stale: str, in_flight: int, buffer_size: int) -> None:
    """Refuse what cannot be.

    Raises:
        NotApplicable: a rule that cannot take late updates.
        ConfigError: a buffer that never fills.
    """
    if stale not in (FACTORS, PRODUCT):
        raise NotApplicable(f"devices.buffer-size = {buffer_size}: {name} cannot take late updates, {stale}")
    if in_flight < buffer_size:
        raise ConfigError(
            f"devices.buffer-size = {buffer_size}: must be at most devices.in-flight = {in_flight}"
        )


def _loss_of(request: PendingRequest) -> float | None:
    return None if request.reply is None else request.reply.metrics.get(TRAIN_LOSS)
