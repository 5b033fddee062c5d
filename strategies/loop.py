"""Flower's loop of rounds around a state; clients are served what they miss, and rounds are reported.

The calls are those of `flwr.serverapp.strategy.Strategy.start`, in its order: ``evaluate_fn(0)``, and in
each round `configure_train`, `aggregate_train`, `configure_evaluate`, `aggregate_evaluate`, ``evaluate_fn``.
"""

from __future__ import annotations

from collections.abc import Callable
from logging import INFO
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora import wire
from fedlora.core.state import State, Template
from fedlora.errors import ConfigError
from strategies.global_adapter import stacked_adapters
from strategies.precision import rounded_state
from strategies.replies import RoundReport
from strategies.rule import Rule
from strategies.starting import template_of
from strategies.transport import Transport
from strategies.wrapped import no_plain_mean, with_arrays

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
"""Flower's: the round and the global arrays."""


class Rounds(Strategy):
    """A strategy with a state between rounds, whose orders a `Transport` carries.

    Attributes:
        rule: how adapters are aggregated.
        scaling: alpha / r of the adapters.
        rank: of the adapters that clients train, 0 for that of the initial arrays.
        seed: root of drawn adapters.
        state: between two rounds; None before the first.
        transport: of this round's orders.
        report: of this round.
        on_round: called with each round's report.
    """

    rule: Rule
    scaling: float
    rank: int
    seed: int
    state: State | None = None
    transport: Transport
    report: RoundReport
    on_round: Callable[[RoundReport], None] | None = None
    _dtype: torch.dtype
    _released: ArrayRecord | None = None

    def begin(self, template: Template) -> State:
        """The state before round 1."""
        return rounded_state(self.rule.init(template, self.seed), self._dtype)

    def open(self, initial_arrays: ArrayRecord) -> tuple[int, ArrayRecord]:
        """Begin with these arrays, or go on from ``self.state``."""
        if self.state is None:
            template = template_of(initial_arrays, self.scaling, self.rule, self.rank, self.seed)
            self.state = self.begin(template)
            self.transport.arrange(initial_arrays)
        self._released = self.arrays()
        return self.state.round, self._released

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

    def arrays(self) -> ArrayRecord:
        """The whole global model over the pristine base: adapter and head under PEFT's keys.

        Base patches are in it, see `strategies.global_adapter`: after them a layer's rank may be any up to
        min(out, in), and its scaling is ``self.scaling`` as before. `fedlora.models.arrays` loads such arrays
        into a PEFT model and writes PEFT's directories.
        """
        assert self.state is not None
        tensors = wire.to_peft(stacked_adapters(self.state), self.state.head)
        return wire.to_record(self.transport.arranged(tensors))

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
        done, arrays = self.open(initial_arrays)
        self.summary()
        train, evaluate = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        result = Result()
        if done == 0:
            _evaluate(evaluate_fn, 0, arrays, result)
        for server_round in range(done + 1, num_rounds + 1):
            log(INFO, "[ROUND %s/%s]", server_round, num_rounds)
            arrays = self._train_round(server_round, arrays, grid, timeout, train, result)
            self._evaluate_round(server_round, arrays, grid, timeout, evaluate, result)
            _evaluate(evaluate_fn, server_round, arrays, result)
            if self.on_round is not None:
                self.on_round(self.report)
        result.arrays = arrays
        return result

    def _train_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float, config: ConfigRecord,
        result: Result,
    ) -> ArrayRecord:  # fmt: skip
        messages = self.configure_train(server_round, arrays, config, grid)
        sent = settings_of(config, server_round)
        replies = self.transport.exchange(grid, list(messages), MessageType.TRAIN, sent, timeout)
        after, metrics = self.aggregate_train(server_round, replies)
        if metrics is not None:
            result.train_metrics_clientapp[server_round] = metrics
        return arrays if after is None else after

    def _evaluate_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float, config: ConfigRecord,
        result: Result,
    ) -> None:  # fmt: skip
        messages = self.configure_evaluate(server_round, arrays, config, grid)
        sent = settings_of(config, server_round)
        replies = self.transport.exchange(grid, list(messages), MessageType.EVALUATE, sent, timeout)
        metrics = self.aggregate_evaluate(server_round, replies)
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics


def settings_of(config: ConfigRecord, server_round: int) -> dict[str, Any]:
    """What the orders of a round say to everybody."""
    return {**config, "server-round": server_round}


def _evaluate(function: EvaluateFn | None, server_round: int, arrays: ArrayRecord, result: Result) -> None:
    metrics = None if function is None else function(server_round, arrays)
    if metrics is not None:
        result.evaluate_metrics_serverapp[server_round] = metrics
