"""Grid in simulated time: an engine's clients behind devices and networks of their own.

Nothing ever sleeps. What a client's work takes follows from bytes, tokens and its device before it trains, so
that the engine is only given what is waited for, in any order. Clients that keep something to themselves, and
private ones, train also where their reply is lost, if they get so far: their next round starts from that, or
they have spent, which a ledger says before the training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from logging import WARNING
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from flwr.app import Error, Message, MessageType
from flwr.common.logger import log
from flwr.serverapp import Grid

from clients.privacy import mechanism_of
from fedlora import wire
from fedlora.config import DevicesConfig
from fedlora.core.state import ClientSpec, InFlight
from fedlora.errors import ConfigError, RunFailed
from fedlora.simulation.arrivals import wait_for
from fedlora.simulation.devices import ClientTask, Devices, Partitions, devices_of, task_of, tiers_of
from fedlora.simulation.local_grid import LocalGrid
from fedlora.simulation.scheduling import Work
from strategies.sampling import clients_of_round

if TYPE_CHECKING:
    from fedlora.server.federated_run import FederatedRun

LOST = 2
"""Code of an error reply: nothing came in time."""
TRAINED_BYTES = 16
"""For each trained number: value, gradient and two moments in float32."""
ATTEMPTS, PAUSE = 1000, 60.0
"""How often a round is tried to begin while too few are there, and the simulated seconds in between."""


@dataclass(kw_only=True)
class TimedGrid(LocalGrid):
    """Flower Grid around another one, whose replies come in simulated time, in the order of their arrival.

    Attributes:
        inner: the engine's.
        devices: of the partitions.
        config: how long a round waits.
        timeout: in place of a deadline.
        seed: of who is there and who vanishes.
        tokens: that a partition trains on in a round.
        fraction: of those that are there, how many replies are wanted; at least ``least_replies``.
        bytes_up: of the reply of a node to its order of now.
        trains_anyway: whether work whose reply is lost is computed, too.
        update_bytes: of what a partition trains, as it travels without savings.
        unfit: partition -> why its device takes no part.
        least: clients without which a round does not begin.
        least_replies: that are waited for.
        server_round: that was done last.
        seconds: since the start of the run.
        present: how many are there.
        node_of: node by partition.
        orders: partitions of the last round -> when they were asked, in seconds since the start.
        arrivals: those of them whose reply is taken -> when it came.
        staleness: of the last round's updates, where rounds do not wait.
    """

    inner: LocalGrid
    devices: Devices
    config: DevicesConfig
    timeout: float
    seed: int
    tokens: Callable[[int], float]
    bytes_up: Callable[[int], int]
    trains_anyway: Callable[[ClientTask], bool]
    fraction: float
    update_bytes: Callable[[int], int] = lambda partition: 0
    unfit: Mapping[int, str] = field(default_factory=dict)
    least: int = 1
    least_replies: int = 1
    server_round: int = 0
    seconds: float = 0.0
    present: int = 0
    node_of: dict[int, int] = field(init=False)
    orders: dict[int, float] = field(default_factory=dict)
    arrivals: dict[int, float] = field(default_factory=dict)
    staleness: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.inner.partition_ids.values())
        self.partition_ids = self.inner.partition_ids
        self.node_of = {partition: node for node, partition in self.partition_ids.items()}
        self._tiers: Partitions | None = None
        self._tasks: dict[int, ClientTask] = {}
        self._fit = np.array(sorted(self.node_of.keys() - self.unfit.keys()), dtype=np.int64)
        for partition, why in self.unfit.items():
            log(WARNING, "partition %s takes no part: %s", partition, why)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there for the round to come, see `there`."""
        return [self.node_of[partition] for partition in self.there().tolist()]

    def there(self) -> Partitions:
        """The partitions that are there for the round to come; while they are too few, time passes.

        Raises:
            RunFailed: they stay too few.
        """
        for attempt in range(ATTEMPTS):
            found = self.devices.present(self._fit, self.server_round + 1, attempt, self.seed)
            if len(found) >= self.least:
                self.seconds += attempt * PAUSE
                self.present = len(found)
                return found
        raise RunFailed(
            f"round {self.server_round + 1}: fewer than {self.least} clients are there in "
            f"{ATTEMPTS * PAUSE / 3600:.0f} simulated hours; devices.* says how often each is"
        )

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies to orders to train as they arrive; everything else takes no simulated time."""
        orders = list(messages)
        train = [m for m in orders if m.metadata.message_type == MessageType.TRAIN]
        if not train or int(train[0].metadata.group_id) == self.server_round:  # a second try of some clients
            return self.inner.send_and_receive(orders, timeout=timeout)
        self.server_round = int(train[0].metadata.group_id)
        by_partition = {self.partition_ids[m.metadata.dst_node_id]: m for m in train}
        tasks = {
            p: self._task(
                p, self.server_round, wire.payload_bytes(m.content), self.bytes_up(m.metadata.dst_node_id)
            )
            for p, m in sorted(by_partition.items())
        }
        wanted = clients_of_round(self.fraction, self.present, max(1, self.least_replies))
        outcome = wait_for([*tasks.values()], deadline=self.config.deadline or self.timeout, wanted=wanted)
        self.orders = dict.fromkeys(by_partition, self.seconds)
        self.arrivals = {partition: self.seconds + at for partition, at in outcome.taken.items()}
        self.seconds += outcome.seconds
        computed = [m for p, m in by_partition.items() if p in outcome.taken or self.trains_anyway(tasks[p])]
        replies = {
            self.partition_ids[reply.metadata.src_node_id]: reply
            for reply in self.inner.send_and_receive(computed, timeout=timeout)
        }
        lost = [_lost(by_partition[partition], why) for partition, why in outcome.lost.items()]
        return [replies[partition] for partition in outcome.taken if partition in replies] + lost

    def tiers(self, count: int) -> Partitions:
        """See `EventGrid.tiers`: by what an order and its reply take that hold what the client trains."""
        if self._tiers is None:
            tasks = [self._nominal(partition) for partition in self._fit.tolist()]
            seconds = {task.partition_id: task.seconds for task in tasks}
            self._tiers = tiers_of(seconds, max(self.node_of) + 1, count)
        return self._tiers

    def _nominal(self, partition: int) -> ClientTask:
        sent = self.update_bytes(partition)
        return self._task(partition, 0, sent, sent)

    def due(self, partition_id: int, server_round: int, bytes_down: int, bytes_up: int) -> tuple[float, str]:
        """Seconds from an order to its reply, or to when it is given up and why."""
        task = self._task(partition_id, server_round, bytes_down, bytes_up)
        self._tasks[partition_id] = task
        outcome = wait_for([task], deadline=self.config.deadline or self.timeout, wanted=1)
        return outcome.seconds, outcome.lost.get(partition_id, "")

    def compute(self, messages: Sequence[Message], *, lost: set[int], timeout: float) -> list[Message]:
        """Replies to the messages, in no simulated time; see ``trains_anyway``."""
        partition = {m.metadata.dst_node_id: self.partition_ids[m.metadata.dst_node_id] for m in messages}
        vain = {p for p in lost if not self.trains_anyway(self._tasks[p])}
        wanted = [m for m in messages if partition[m.metadata.dst_node_id] not in vain]
        replies = self.inner.send_and_receive(wanted, timeout=timeout)
        return [reply for reply in replies if partition[reply.metadata.src_node_id] not in lost]

    def close_round(self, server_round: int, version: int, used: Sequence[InFlight]) -> None:
        """Note what a round was made of."""
        self.server_round = server_round
        self.orders = {flight.partition_id: flight.ordered for flight in used}
        self.arrivals = {flight.partition_id: flight.arrives for flight in used}
        self.staleness = {flight.partition_id: version - flight.version for flight in used}

    def record(self) -> dict[str, Any]:
        """What the last round adds to its line in ``rounds.jsonl``."""
        return {
            "virtual_seconds": self.seconds,
            "orders": {str(partition): seconds for partition, seconds in self.orders.items()},
            "arrivals": {str(partition): seconds for partition, seconds in self.arrivals.items()},
            **({"staleness": {str(p): n for p, n in self.staleness.items()}} if self.staleness else {}),
        }

    def _task(self, partition: int, server_round: int, bytes_down: int, bytes_up: int) -> ClientTask:
        return task_of(
            self.devices(partition), partition, server_round, self.seed,
            tokens=self.tokens(partition), bytes_down=bytes_down, bytes_up=bytes_up,
        )  # fmt: skip


def timed(grid: LocalGrid, run: FederatedRun, work: Work) -> Grid:
    """The grid of a run in simulated time, from where its record ends; the grid itself where time is real.

    Raises:
        ConfigError: a trace that cannot be used, or no device that can hold the model.
    """
    config, session, records = run.config, run.session, run.directory.rounds()
    if not config.devices.timed:
        return grid
    devices, trained = devices_of(config, run.partitions), trained_numbers(run)
    unfit = too_small(devices, run, trained)
    fit = len(run.partitions) - len(unfit)
    if fit < max(1, config.devices.in_flight, config.devices.tiers):
        key = "tiers" if config.devices.tiers else "in-flight"
        wanted = f"devices.{key} = {getattr(config.devices, key.replace('-', '_'))}" if fit else "devices"
        why = next(iter(unfit.values()))
        raise ConfigError(f"{wanted}: only {fit} clients can take part, of the others for instance {why}")
    clock = TimedGrid(
        inner=grid,
        devices=devices,
        config=config.devices,
        timeout=config.round_timeout,
        seed=config.seed,
        tokens=work,
        bytes_up=run.strategy.transport.expected_bytes,
        trains_anyway=_trains_anyway(run),
        fraction=config.fraction_train,
        update_bytes=lambda partition: 4 * trained(partition),
        unfit=unfit,
        least=max(config.min_available_nodes, config.min_train_nodes),
        least_replies=config.min_train_nodes,
        server_round=run.state.round,
        seconds=records[-1]["virtual_seconds"] if records else 0.0,
    )
    session.clock = clock
    return clock


def _trains_anyway(run: FederatedRun) -> Callable[[ClientTask], bool]:
    """Whether work counts although its reply is lost: for what was spent, or what the client keeps."""
    if mechanism_of(run.config).draws_batches:
        return lambda task: task.begins
    keeps = run.personal or run.config.lora.personal_rank > 0
    return lambda task: keeps and task.trains


def trained_numbers(run: FederatedRun) -> Callable[[int], int]:
    """How many numbers a partition trains, by what it is sent first."""

    @cache
    def of(spec: ClientSpec) -> int:
        sent = run.strategy.rule.broadcast(run.state, spec)
        trained = wire.to_peft(sent.adapters, sent.head, sent.trained, sent.modules)
        return sum(tensor.numel() for tensor in trained.values())

    return lambda partition: of(replace(run.strategy.client_spec(partition), partition_id=0))


def too_small(devices: Devices, run: FederatedRun, trained: Callable[[int], int]) -> dict[int, str]:
    """The partitions whose device cannot hold what must be held at the least, and why.

    That is the base, and of each trained number its value, its gradient and two moments in float32; what a
    batch needs on top is not counted.
    """
    base, unfit = run.runtime.model.base_bytes(), {}
    for partition in run.partitions:
        memory = devices(partition).memory_gb
        needed = 0 if memory is None else base + TRAINED_BYTES * trained(partition)
        if memory is not None and needed > memory * 1e9:
            unfit[partition] = (
                f"its device has {memory:g} GB, and model, adapter and optimiser need {needed / 1e9:.3g} GB"
            )
    return unfit


def _lost(message: Message, why: str) -> Message:
    if not message.metadata.message_id:
        message.metadata.__dict__["_message_id"] = str(uuid4())
    return Message(Error(LOST, why), reply_to=message)
