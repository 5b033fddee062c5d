"""Loops over rounds around a state, which can be taken out between two of them and put back.

`Rounds.rounds` is the loop, one report a round; Flower's `start` consumes it. The calls are those of
`flwr.serverapp.strategy.Strategy.start`, in its order: ``evaluate_fn(0)``, and in each round
`configure_train`, `aggregate_train`, `configure_evaluate`, `aggregate_evaluate`, ``evaluate_fn``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora import wire
from fedlora.core.adapters import lora_set
from fedlora.core.factors import AdapterSet, LoraFactors, Product, bounded
from fedlora.core.state import Broadcast, ClientUpdate, ServerState, State, Template
from fedlora.errors import ConfigError
from strategies.adaptive_dp import AdaptiveClientDP
from strategies.client_dp import ClientDP
from strategies.diagnostics import Diagnostics
from strategies.overdue import Overdue
from strategies.precision import rounded_state
from strategies.report import RoundReport
from strategies.rule import Rule
from strategies.sampling import Selection
from strategies.starting import template_of
from strategies.transport import Transport
from strategies.wrapped import no_plain_mean, with_arrays

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
"""Flower's: the round and the global arrays."""
BeforePublishing = Callable[[int, Mapping[int, int]], None]
"""The round, and how often each partition was asked by then."""


class Rounds(Strategy):
    """Strategy with a state between rounds, whose instructions a `Transport` carries.

    Attributes:
        rule: how adapters are aggregated.
        scaling: alpha / r of the adapters.
        rank: of the adapters that clients train, 0 for that of the initial arrays.
        seed: root of drawn adapters.
        state: between two rounds; None before the first.
        selection: who takes part.
        transport: of this round's instructions.
        client_dp: client-level privacy, with the noise that later rounds take back; None without it.
        before_publishing: called before a round's new state leaves the strategy, where nobody can draw its
            client-level noise again: whoever goes on from a `snapshot` of before it makes another release.
        report: of this round.
        diagnostics: whether aggregations are measured.
    """

    rule: Rule
    scaling: float
    rank: int
    seed: int
    state: State | None = None
    selection: Selection
    transport: Transport
    report: RoundReport
    client_dp: ClientDP | AdaptiveClientDP | None = None
    before_publishing: BeforePublishing | None = None
    diagnostics: bool = True
    _dtype: torch.dtype
    _released: ArrayRecord | None = None

    def begin(self, template: Template) -> None:
        """Take the state before round 1."""
        self.state = rounded_state(self.rule.init(template, self.seed), self._dtype)

    def open(self, initial_arrays: ArrayRecord) -> ArrayRecord:
        """Begin with these arrays, or go on from the state; returns the global arrays of now."""
        if self.state is None:
            self.begin(template_of(initial_arrays, self.scaling, self.rule, self.rank, self.seed))
            self.transport.arrange(initial_arrays)
        self._released = self.arrays()
        return self._released

    def snapshot(self) -> ServerState:
        """State that `restore` goes on from; later rounds leave it as it is."""
        assert self.state is not None
        acknowledged = {partition: set(held) for partition, held in self.transport.acknowledged.items()}
        heads = dict(self.transport.ledger_heads)
        asked, private = dict(self.selection.asked), self.client_dp.memory() if self.client_dp else {}
        participations = dict(self.selection.participations)
        return ServerState(self.state, participations, acknowledged, heads, asked=asked, private=private)

    def restore(self, snapshot: ServerState) -> None:
        """Go on from a `snapshot`.

        Raises:
            ConfigError: it lacks what client-level privacy goes on from.
        """
        if self.client_dp is not None:
            self.client_dp.remember(snapshot.private, snapshot.state.round)
        self.selection.asked = dict(snapshot.asked)
        self.state = snapshot.state
        self.selection.participations = snapshot.participations
        self.transport.acknowledged = snapshot.acknowledged
        self.transport.ledger_heads = snapshot.ledger_heads
        self._released = None

    def _take(self, arrays: ArrayRecord) -> None:
        """Go on from the arrays of somebody else's loop, where these are not those that were released.

        Raises:
            ConfigError: they were changed, and the rule's aggregate is no plain mean.
        """
        if self.state is None:
            self.open(arrays)
            self._released = arrays
        if arrays is self._released or arrays == self._released:
            return
        if why := no_plain_mean(self.rule):
            raise ConfigError(f"{self.rule.facts.title}: the arrays were changed between rounds, but {why}")
        assert self.state is not None
        self.state = rounded_state(with_arrays(self.state, arrays), self._dtype)
        self._released = arrays

    def _next_state(
        self, starts: Mapping[int, Broadcast], updates: Sequence[ClientUpdate]
    ) -> tuple[State, Diagnostics | None]:
        """The next state, as it can be sent."""
        assert self.state is not None
        if self.client_dp is not None:
            self.report.clipping_norm = self.client_dp.adapted_norm
            updates = self.client_dp.privatise(updates, starts, len(starts), self.report.server_round)
        state, measured = self.rule.aggregate(self.state, updates, diagnostics=self.diagnostics)
        state = rounded_state(state, self._dtype)
        if self.before_publishing is not None and self.client_dp is not None and not self.client_dp.seeded:
            self.before_publishing(self.report.server_round, self.selection.participations)
        return state, measured

    def arrays(self) -> ArrayRecord:
        """The whole global model over the pristine base: adapter and head under PEFT's keys.

        Base patches are in it, see `stacked_adapters`: after them a layer's rank may be any up to
        min(out, in), and its scaling is ``self.scaling`` as before. `fedlora.models.arrays` loads such arrays
        into a PEFT model and writes PEFT's directories.
        """
        assert self.state is not None
        tensors = wire.to_peft(stacked_adapters(self.state), self.state.head)
        return wire.to_record(self.transport.arranged(tensors))

    def rounds(
        self,
        grid: Grid,
        last: int,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
    ) -> Iterator[RoundReport]:
        """Carry out the rounds that are not done yet up to ``last``, one for each report that is asked for.

        Between two reports nothing is on its way: `snapshot` has all that the next round depends on.

        Args:
            grid: reaches the clients.
            last: number of the last round, from 1.
            timeout: seconds for the replies of a round, once to training and once to evaluation.
            train_config: plain settings that go to every client that trains.
            evaluate_config: likewise to every client that evaluates.

        Raises:
            ConfigError: there is no state to go on from.
            RunFailed: too few clients connected, or too few valid updates in a round.
        """
        if self.state is None:
            raise ConfigError("rounds: there is nothing to go on from, call open(initial_arrays) first")
        if self._released is None:
            self._released = self.arrays()
        arrays = self._released
        train, evaluate = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        overdue = Overdue()
        for server_round in range(self.state.round + 1, last + 1):
            log(INFO, "[ROUND %s/%s]", server_round, last)
            arrays = self.train_round(grid, arrays, train, server_round, last, timeout)
            self._note_late(grid, overdue)
            messages = self.configure_evaluate(server_round, arrays, evaluate, grid)
            replies = self._exchange(grid, messages, MessageType.EVALUATE, evaluate, server_round, timeout)
            self.report.evaluate_metrics = self.aggregate_evaluate(server_round, replies)
            self.report.arrays = arrays
            yield self.report

    def _note_late(self, grid: Grid, overdue: Overdue) -> None:
        """Count and attribute replies that came after their round; what they released has been spent."""
        newer = {request.partition_id for request in self.transport.requests if request.reply is not None}
        for server_round, request in overdue.answered(getattr(grid, "late", list)()):
            what = f"its reply to round {server_round} came after that had ended"
            log(WARNING, "\tpartition %s is late: %s", request.partition_id, what)
            self.report.late[request.partition_id] = what
            self.report.bytes_up += request.bytes_up
            if request.partition_id not in newer:
                self.report.note(request.partition_id, request.reply)
                self.transport.note_ledger(request)
        if hasattr(grid, "late"):
            overdue.note(self.report.server_round, self.transport.requests)

    def train_round(
        self, grid: Grid, arrays: ArrayRecord, config: ConfigRecord, server_round: int, last: int,
        timeout: float,
    ) -> ArrayRecord:  # fmt: skip
        """Train and aggregate once; returns the global arrays after it. Fills in ``self.report``."""
        messages = self.configure_train(server_round, arrays, config, grid)
        replies = self._exchange(grid, messages, MessageType.TRAIN, config, server_round, timeout)
        after, self.report.train_metrics = self.aggregate_train(server_round, replies)
        return arrays if after is None else after

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the rounds that are not done yet up to ``num_rounds``; arguments as in Flower.

        Returns:
            Flower's Result; its ``arrays`` are the global ones after the last round.

        Raises:
            RunFailed: too few clients connected, or too few valid updates in a round.
        """
        log(INFO, "Starting %s strategy:", type(self).__name__)
        result = Result()
        result.arrays = self.open(initial_arrays)
        self.summary()
        if self.state is not None and self.state.round == 0:
            _evaluate(evaluate_fn, 0, result)
        for report in self.rounds(grid, num_rounds, timeout, train_config, evaluate_config):
            result.arrays = report.arrays
            if report.train_metrics is not None:
                result.train_metrics_clientapp[report.server_round] = report.train_metrics
            if report.evaluate_metrics is not None:
                result.evaluate_metrics_clientapp[report.server_round] = report.evaluate_metrics
            _evaluate(evaluate_fn, report.server_round, result)
        return result

    def _exchange(
        self, grid: Grid, messages: Iterable[Message], kind: str, config: ConfigRecord, server_round: int,
        timeout: float,
    ) -> list[Message]:  # fmt: skip
        return self.transport.exchange(
            grid.send_and_receive, list(messages), kind, settings_of(config, server_round), timeout
        )


def settings_of(config: ConfigRecord, server_round: int) -> dict[str, Any]:
    """Settings of a round that go to everybody."""
    return {**config, "server-round": server_round}


def _evaluate(function: EvaluateFn | None, server_round: int, result: Result) -> None:
    metrics = None if function is None else function(server_round, result.arrays)
    if metrics is not None:
        result.evaluate_metrics_serverapp[server_round] = metrics


def stacked_adapters(state: State) -> AdapterSet:
    """Adapters that make the global model from the pristine base, for whoever applies no base patches.

        s B A  =  P_1 + .. + P_v + s B_v A_v        (each layer; s stays the adapter's scaling)

    Patches and adapter are stacked, and where their ranks sum to more than the layer has rows or columns the
    matrix is multiplied out, ``I M`` or ``M I``. No decomposition: the cost is one product for each layer,
    so that it can be had every round. `fedlora.models.export.global_adapters` takes the SVD, for files.
    A layer whose base never moved keeps its own factors bit for bit (a core is folded into A). The others
    have a rank of min(out, in) at most, and their scaling is still that of the state's adapter.
    """
    moved = state.moved
    return {n: _whole(state, n) if n in moved else f.folded() for n, f in lora_set(state.adapters).items()}


def _whole(state: State, name: str) -> LoraFactors:
    scaling, stacked = state.adapters[name].scaling, state.product(name)
    exact = bounded(Product(stacked.left.double(), stacked.right.double()))
    dtype = stacked.left.dtype
    return LoraFactors(A=(exact.right / scaling).to(dtype), B=exact.left.to(dtype), scaling=scaling)
