"""One run: a configuration becomes a strategy, its rounds become a run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from clients.rehearsal import rehearse
from clients.runtime import ClientRuntime, client_runtime
from fedlora.config import RunConfig
from fedlora.core.factors import Tensors
from fedlora.core.state import ServerState, State
from fedlora.errors import ConfigError, RunFailed
from fedlora.privacy.calibration import warn_of_delta
from fedlora.server.build import assemble
from fedlora.server.client_privacy import clients_spent
from fedlora.server.directory import RunDirectory
from fedlora.server.evaluator import GlobalEvaluator
from fedlora.server.exactness import mean_is_exact
from fedlora.server.export import export, own_tensors
from fedlora.server.inputs import inputs_digest
from fedlora.server.records import (
    BY_CLIENT,
    MEASURED,
    accuracy_by_client,
    personal_summary,
    result_record,
    round_record,
    spread,
)
from fedlora.server.tracking import Tracking
from fedlora.server.validate import check, kept
from strategies.flower import FactorStrategy
from strategies.nodes import NodeDirectory
from strategies.replies import RoundReport

Progress = Callable[[dict[str, Any]], None]
"""Called with each round's record, as it is written to ``rounds.jsonl``."""


@dataclass(slots=True)
class FederatedRun:
    """One run: everything between a Grid and a run directory.

    Attributes:
        config: what to do.
        directory: where the results go; a checkpoint in it is resumed.
        progress: told about each round.
        stores: where the clients keep what they hold, if that can be read from here (in simulation).
        nodes: the partitions of the nodes of a deployment, which hold their data; None: those of the
            data here.
        node_directory: who is who among the nodes, where their keys say so.
        verify: called after the last round; raises RunFailed where the rounds cannot be relied on.
        evaluator: evaluates the global model.
    """

    config: RunConfig
    directory: RunDirectory
    progress: Progress | None = None
    stores: Path | None = None
    nodes: Collection[int] | None = None
    verify: Callable[[], None] | None = None
    node_directory: NodeDirectory | None = None
    runtime: ClientRuntime = field(init=False)
    strategy: FactorStrategy = field(init=False)
    run_key: str = field(init=False, default="")
    _began: float = field(init=False, default=0.0)
    _tracking: Tracking = field(init=False)
    evaluator: GlobalEvaluator = field(init=False)

    def __post_init__(self) -> None:
        rule = check(self.config)
        self.runtime = client_runtime(self.config)
        self.evaluator = GlobalEvaluator(self.config, self.runtime)
        if self.config.privacy.private and self.nodes is None:
            self._check_private()
        if self.config.privacy.client_level:
            warn_of_delta(self.config.privacy.target_delta, len(self.partitions), "clients")
        self.strategy = assemble(
            rule,
            self.config,
            self.runtime,
            self.partitions,
            clients_evaluate=lambda server_round: self.personal and self._is_measured(server_round),
            seeded=self.stores is not None,
            packed=self.nodes is not None,
            node_directory=self.node_directory,
        )
        begun = self.state
        rehearse(self.runtime, self.config, begun.adapters, begun.head, rule.trained(1))
        checkpoint = self.directory.load_checkpoint()
        if self.config.privacy.private and self.stores is not None:
            from clients.ledger_ref import check_ledgers, ledger_directory

            ledgers = ledger_directory(self.config, self.stores, simulation=True)
            heads = checkpoint.ledger_heads if checkpoint is not None else {}
            check_ledgers(self.config, self.runtime.data, self.partitions, ledgers, heads)
        inputs = inputs_digest(self.config, self.runtime) if self.nodes is None else None
        self.directory.open(self.config, inputs, continues=checkpoint is not None)
        self._restore(checkpoint)

    @property
    def partitions(self) -> Collection[int]:
        """The partitions that may take part."""
        there = self.runtime.data.clients if self.nodes is None else sorted(self.nodes)
        chosen = self.config.partition_list
        for partition in sorted({*chosen} & {*self.left_out}):
            raise ConfigError(
                f"partitions = {self.config.partitions!r}: partition {partition} cannot take part, "
                f"{self.left_out[partition]}"
            )
        if not all(partition in there for partition in chosen):
            whose = "the data has" if self.nodes is None else "the nodes are"
            raise ConfigError(
                f"partitions = {self.config.partitions!r}: {whose} partitions {there[0]} to {there[-1]}"
            )
        return chosen or there

    @property
    def left_out(self) -> Mapping[int, str]:
        """Partitions of the data here that have no example to train on, and why."""
        return self.runtime.data.left_out if self.nodes is None else {}

    def run(self, grid: Grid) -> dict[str, Any]:
        """All remaining rounds, then the whole test set and the adapter; returns the result record.

        Raises:
            RunFailed: too few clients or valid updates; what was written before is kept.
        """
        self._tracking = Tracking(self.config, self.directory.path)
        try:
            return self._run(grid)
        finally:
            self._tracking.close()

    def _run(self, grid: Grid) -> dict[str, Any]:
        self._measure_before()
        self._began = time.monotonic()
        settings = ConfigRecord({"run-key": self.run_key, "labels": list(self.runtime.data.label_names)})
        last, timeout = self.config.num_server_rounds, self.config.round_timeout
        for report in self.strategy.rounds(grid, last, timeout, settings, settings):
            self._after_round(report)
        return self._finish()

    # --- before ------------------------------------------------------------------------------------

    def _check_private(self) -> None:
        """Refuse data here that cannot be trained on privately; nodes look at their own."""
        from clients.budget import rate_of
        from clients.ledger_ref import check_disjoint
        from clients.training.dp_sgd import check_private

        data, config = self.runtime.data, self.config
        rates = {p: rate_of(config, len(data.indices(p))) for p in self.partitions}
        for rate in rates.values():
            check_private(config.train, rate)
        check_disjoint(config, data, self.partitions)
        largest = min(rates, key=lambda p: rates[p])
        public = round(config.train.batch_size / rates[largest])
        warn_of_delta(config.privacy.target_delta, public, f"examples of partition {largest}")

    def _restore(self, checkpoint: ServerState | None) -> None:
        self.run_key = self.directory.run_key()
        if checkpoint is not None:
            self.strategy.restore(checkpoint)
        self.directory.keep_rounds(self.state.round)

    def _measure_before(self) -> None:
        """What a pretrained model can do already, where it is no fresh head that decides that."""
        if self.runtime.model.task.labelled or self.directory.before() is not None:
            return
        began = time.monotonic()
        whole = self.evaluator.whole(self.state)
        self._write_samples("before")
        self.directory.write_before(self.evaluator.record(whole))
        if self.progress is not None:
            measured = self.evaluator.part(self.state)
            self.progress({"round": 0, **measured, "refused": {}, "seconds": time.monotonic() - began})

    def _write_samples(self, when: str) -> None:
        """``samples.json``: what the global model writes, where it writes."""
        task = self.runtime.model.task
        if task.unit == "token" and not self.personal:
            self.directory.write_samples(when, self.evaluator.samples(self.state))

    # --- after each round ----------------------------------------------------------------------------

    @property
    def personal(self) -> bool:
        """Clients keep something trained to themselves, so that only they can measure their models."""
        return bool(kept(self.config, self.strategy.rule))

    @property
    def state(self) -> State:
        assert self.strategy.state is not None
        return self.strategy.state

    def _after_round(self, report: RoundReport) -> None:
        config, server_round = self.config, report.server_round
        measured: dict[str, Any] = {"accuracy": None, "loss": None}
        if self._is_measured(server_round):
            measured = self._measure(report)
        if config.privacy.client_level:
            report.privacy = clients_spent(config, self.strategy.selection.participations)
        now = time.monotonic()
        record = round_record(config, report, measured, now - self._began)
        record |= {"left_out": {str(p): why for p, why in self.left_out.items()}} if self.left_out else {}
        self._began = now
        self.directory.append_round(record)
        self._tracking.log_round(record)
        self.directory.save_checkpoint(self.strategy.snapshot())
        if self.progress is not None:
            self.progress(record)

    def _is_measured(self, server_round: int) -> bool:
        return server_round % self.config.evaluate_every == 0 or server_round == self.config.num_server_rounds

    def _measure(self, report: RoundReport) -> dict[str, Any]:
        """The global model on the fixed subset; without one, each client's model on its own domains."""
        if self.personal:
            return personal_summary(
                report.client_metrics, self.runtime.data.domain_names, self.runtime.model.task
            )
        if report.server_round == self.config.num_server_rounds:
            self.evaluator.whole(self.state)
        return self.evaluator.part(self.state)

    # --- at the end ------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        data, records = self.runtime.data, self.directory.rounds()
        measured = [key for key in MEASURED if key in records[-1]]
        outcome: dict[str, Any] = {key: records[-1][key] for key in measured}
        by_client = records[-1].get(BY_CLIENT)
        if not self.personal:
            whole = self.evaluator.whole(self.state)
            outcome, by_client = self.evaluator.record(whole), None
            if self.nodes is None:  # nodes alone know which domains they hold
                by_client = accuracy_by_client(whole, data, self.partitions, self.config.data.partitioner)
        outcome |= spread(by_client)
        result = result_record(self.config, data, records, outcome, self.directory.before())
        if self.config.lora.method != "lora":
            rule, model = self.strategy.rule, self.runtime.model
            exact = mean_is_exact(rule, model, self.state.adapters)
            result |= {"lora_method": self.config.lora.method, "exact": exact}
        self._verify()
        self._write_samples("after")
        average = bool(self.strategy.rule.facts.uploaded)
        export(self.directory.path, self.config, self.runtime, self.state, self._own(), average=average)
        self.directory.write_result(result)
        self._tracking.log_result(result)
        return result

    def _own(self) -> dict[int, Tensors]:
        """What clients kept to themselves, where it can be reached."""
        if not self.personal or self.stores is None:
            return {}
        return own_tensors(self.stores / self.run_key, self.partitions, self.state.round)

    def _verify(self) -> None:
        try:
            if self.verify is not None:
                self.verify()
        except RunFailed as error:
            self.directory.condemn(str(error))
            raise
