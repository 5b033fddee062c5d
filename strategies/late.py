"""Rounds that do not wait for everybody: updates that started from an older version of the model.

    x_{t+1} = aggregate(x_t, { s(tau_k) Delta_k }),    s(tau) = 1 / sqrt(1 + tau),    tau_k = t - t_k

where Delta_k is what client k changed since the version t_k that it started from. What a change is follows
from the rule (`Facts.stale`): of factors, it is added to the factors of now; of products, s_k B_k A_k itself,
which goes into the base. With tau = 0 an update is taken as it came. Whose updates an aggregation is of says
a subclass: `strategies.buffered`, `strategies.tiered`. The Grid says who finishes when, in simulated time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MessageType
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedlora.core.adapters import LayerAdapter, as_lora
from fedlora.core.factors import Tensors
from fedlora.core.seeding import stream
from fedlora.core.state import Broadcast, ClientUpdate, InFlight, ServerState
from fedlora.errors import FactorShapeError, NotApplicable, RunFailed, UpdateRefused
from strategies.at_work import AtWork, EventGrid
from strategies.flower import FactorStrategy
from strategies.loop import settings_of
from strategies.metrics import mean_of_losses, told_loss
from strategies.precision import rounded_broadcast, rounded_state
from strategies.report import RoundReport
from strategies.request import PendingRequest
from strategies.rule import Rule

FACTORS, PRODUCT = "factors", "product"
"""What of a late update is added: see `Facts.stale`."""


class LateStrategy(FactorStrategy):
    """Strategy of a rule whose rounds do not wait for everybody.

    Args:
        arguments, named: as of `FactorStrategy`.
        max_staleness: an older update is dropped; 0 drops none for that.
        discount: s(tau) falls with the root; otherwise it is 1.

    Raises:
        NotApplicable: a rule that cannot take late updates.
    """

    def __init__(self, *arguments: Any, max_staleness: int = 0, discount: bool = True, **named: Any) -> None:
        super().__init__(*arguments, **named)
        check_late(self.rule)
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
        """Start clients and take their replies as they come, until there is a buffer; then aggregate.

        Where nobody is at work any more and nobody is free, it is aggregated as it is.

        Raises:
            RunFailed: nobody is at work and nobody is there to start, or no update of the buffer is valid.
        """
        clock: EventGrid = grid  # type: ignore[assignment]
        assert self.state is not None
        self._take(arrays)
        self.report = RoundReport(server_round=server_round)
        self.transport.open(self.state.base)
        work = AtWork(clock.there(), settings_of(config, server_round), server_round == last)
        for flight in self.flights:
            work.push(flight)
        self._fill(clock, work)
        while self._train(clock, work, timeout):
            self._fill(clock, work)
        self._count_bytes()
        self.flights = sorted(work.flights.values(), key=lambda flight: (flight.arrives, flight.number))
        version = self.state.round
        self._aggregate(work.buffer)
        clock.close_round(server_round, version, work.buffer)
        self._released = self.arrays()
        return self._released

    def _fill(self, clock: EventGrid, work: AtWork) -> None:
        """Let time pass until there is a buffer, or nobody is at work and nobody free."""
        raise NotImplementedError

    def _arrive(self, work: AtWork, flight: InFlight) -> None:
        """Put what has arrived into the buffer, or say why it is of no use."""
        if why := flight.lost or flight.refused or self._too_old(flight):
            self.report.refuse({flight.partition_id: why})
            work.drop(flight)
        else:
            work.buffer.append(flight)

    def _train(self, clock: EventGrid, work: AtWork, timeout: float) -> bool:
        """Have the clients trained that were started; whether one of the buffer turned out to be of no use.

        In the last round only those of the buffer: what the others bring would never be aggregated.
        """
        buffered = {flight.partition_id for flight in work.buffer}
        wanted = [p for p in work.started if p not in work.trained and (p in buffered or not work.last)]
        work.trained.update(wanted)
        messages = [message for p in wanted for message in work.started[p][0].sent]
        send = partial(clock.compute, lost={p for p in wanted if work.started[p][1].lost})
        replies = self.transport.exchange(send, messages, MessageType.TRAIN, work.settings, timeout)
        self.transport.settle(replies)
        for request, flight in map(work.started.__getitem__, wanted):
            if not flight.lost:
                work.replace(flight, self._brought_by(request, flight))
        useless = {f.partition_id: f.refused for f in work.buffer if f.refused}
        self.report.refuse(useless)
        work.buffer = [flight for flight in work.buffer if not flight.refused]
        return bool(useless)

    def _too_old(self, flight: InFlight) -> str:
        """Reason to drop an update for its age; empty if there is none."""
        assert self.state is not None
        old = self.state.round - flight.version
        if not self.max_staleness or old <= self.max_staleness:
            return ""
        return f"its update is {old} versions old, devices.max-staleness = {self.max_staleness}"

    def _start(self, clock: EventGrid, work: AtWork, among: NDArray[np.int64]) -> bool:
        """Start somebody of these who is free from the model of now; whether there is anybody."""
        assert self.state is not None
        server_round, place = self.report.server_round, len(work.started)
        partition = work.free(
            among, self.selection.may_train, stream(self.seed, "starting", server_round, place)
        )
        if partition is None:
            return False
        self.selection.count(partition)
        request = self.transport.add(partition, clock.node_of[partition], self._broadcast(partition))
        self.transport.message(request, MessageType.TRAIN, work.settings)
        bytes_up = self.transport.expected_bytes(request.node_id)
        seconds, why = clock.due(partition, server_round, request.bytes_down, bytes_up)
        number = server_round * 1_000_000 + place
        flight = InFlight(
            partition, self.state.round, clock.seconds + seconds, number, lost=why, ordered=clock.seconds
        )
        work.started[partition] = request, flight
        work.push(flight)
        return True

    def _broadcast(self, partition_id: int) -> Broadcast:
        assert self.state is not None
        broadcast = self.rule.broadcast(self.state, self.client_spec(partition_id))
        return rounded_broadcast(broadcast, self._dtype)

    def _brought_by(self, request: PendingRequest, flight: InFlight) -> InFlight:
        """The flight of a client that has trained, with what it brings or why it cannot be used."""
        self._note(request)
        try:
            update = self._accept(request)
        except (UpdateRefused, FactorShapeError) as error:
            return replace(flight, refused=str(error))
        brought = self._brought(update, request.broadcast)
        return replace(flight, tensors=brought, weight=update.weight, loss=told_loss(request))

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

    def _aggregate(self, buffer: list[InFlight]) -> None:
        assert self.state is not None
        if len(buffer) < max(1, self.selection.min_train_nodes):
            raise RunFailed(
                f"round {self.report.server_round}: {len(buffer)} valid updates in the buffer, "
                f"min-train-nodes = {self.selection.min_train_nodes} "
                f"({self.report.refusals() or 'nobody is at work'})"
            )
        counted = sorted(buffer, key=lambda flight: flight.partition_id)
        updates = [self._landed(flight) for flight in counted]
        state, self.report.diagnostics = self.rule.aggregate(
            self.state, updates, diagnostics=self.diagnostics
        )
        self.state = rounded_state(state, self._dtype)
        self.report.participants = [update.partition_id for update in updates]
        self.report.train_loss = mean_of_losses((flight.weight, flight.loss) for flight in counted)


def check_late(rule: Rule, key: str = "late updates") -> None:
    """Refuse a rule that cannot take late updates; ``key`` says who wants it to.

    Raises:
        NotApplicable: it cannot.
    """
    if rule.facts.stale not in (FACTORS, PRODUCT):
        raise NotApplicable(f"{key}: {rule.facts.name} cannot take late updates, {rule.facts.stale}")
