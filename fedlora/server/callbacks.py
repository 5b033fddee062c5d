"""Callbacks of a run, in the order in which they are called: evaluation, record, tracker, checkpoint.

`FederatedRun` calls each before its rounds, after each round and at the end. The record of a round
(``report.record``) and the result are filled in as they are passed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from clients.personal import SECOND
from clients.privacy import mechanism_of
from clients.store import OWN
from fedlora.core.factors import Tensors
from fedlora.core.peft_keys import to_peft
from fedlora.models.packed_linear import tell_if_emulated
from fedlora.server import best
from fedlora.server.build import client_spec
from fedlora.server.evaluator import GlobalEvaluator, is_measured
from fedlora.server.exactness import mean_is_exact
from fedlora.server.export import counted_intruders, export, export_seconds, kept_by
from fedlora.server.model_card import about_run
from fedlora.server.personal import PERSONAL, second_summary
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
from fedlora.server.untrained import untrained
from strategies.report import RoundReport

if TYPE_CHECKING:
    from fedlora.server.federated_run import FederatedRun


class Callback:
    """Called by a run; each of these does nothing."""

    def before_run(self, run: FederatedRun) -> None:
        """Before the first of the rounds that are not done yet."""

    def after_round(self, run: FederatedRun, report: RoundReport) -> None:
        """After each round; ``run.strategy`` is between two rounds."""

    def after_run(self, run: FederatedRun, result: dict[str, Any]) -> None:
        """After the last round; what is in ``result`` then is returned."""

    def close(self) -> None:
        """However the run ends."""


class Evaluate(Callback):
    """Evaluates the global model, or where clients keep a part of it collects what they found."""

    def before_run(self, run: FederatedRun) -> None:
        """Evaluates a pretrained model before round 1, where no fresh head decides the figures."""
        self._global = GlobalEvaluator(run.session)
        tell_if_emulated(run.runtime.model, run.config.evaluation_precision)
        if run.runtime.model.task.labelled or run.directory.before() is not None:
            return
        began = time.monotonic()
        found = untrained(run, self._global)
        if found["samples"] is not None:
            run.directory.write_samples("before", found["samples"])
        run.directory.write_before(found["whole"])
        run.before = {"round": 0, **found["part"], "refused": {}, "seconds": time.monotonic() - began}

    def after_round(self, run: FederatedRun, report: RoundReport) -> None:
        """Begin the round's record: accuracy, loss and what else the task has; None where not measured."""
        if run.config.generate_every and report.server_round % run.config.generate_every == 0:
            self._write_samples(run, f"round {report.server_round}")
        report.record = {"accuracy": None, "loss": None}
        if not is_measured(run.config, report.server_round):
            return
        if run.personal:
            data, task = run.runtime.data, run.runtime.model.task
            report.record = personal_summary(report.client_metrics, data.domain_names, task)
            return
        if report.server_round == run.config.num_server_rounds:
            self._global.whole(run.state)
        report.record = self._global.part(run.state)
        if run.config.lora.personal_rank:
            data, task = run.runtime.data, run.runtime.model.task
            report.record |= second_summary(report.client_metrics, data.domain_names, task)

    def after_run(self, run: FederatedRun, result: dict[str, Any]) -> None:
        """Begin the result: the last model on the whole test set, and how clients differ."""
        last = run.directory.rounds()[-1]
        outcome: dict[str, Any] = {key: last[key] for key in MEASURED if key in last}
        by_client = last.get(BY_CLIENT)
        if not run.personal:
            whole = self._global.whole(run.state)
            outcome, by_client = self._global.record(whole), None
            outcome |= self._global.sets(run.state, whole=True) | self._global.errors(whole)
            if run.session.nodes is None:  # nodes alone know which domains they hold
                partitioner = run.config.data.partitioner
                by_client = accuracy_by_client(whole, run.runtime.data, run.partitions, partitioner)
        result |= outcome | spread(by_client) | {key: last[key] for key in (PERSONAL,) if key in last}
        self._write_samples(run, "after")

    def _write_samples(self, run: FederatedRun, when: str) -> None:
        """``samples.json``: what the global model writes, where it writes."""
        if run.runtime.model.task.unit == "token" and not run.personal:
            run.directory.write_samples(when, self._global.samples(run.state))


class Record(Callback):
    """Writes ``rounds.jsonl``, and at the end ``adapter/``; it completes the result."""

    def before_run(self, run: FederatedRun) -> None:
        """Time runs from here."""
        self._began = time.monotonic()

    def after_round(self, run: FederatedRun, report: RoundReport) -> None:
        """Complete the round's record and write it."""
        privacy = mechanism_of(run.config)
        spent = privacy.spent(run.strategy.snapshot().participations) or report.privacy
        clients = len(run.partitions)
        report.privacy = {p: {**claim, **privacy.beside(claim, clients)} for p, claim in spent.items()}
        now = time.monotonic()
        report.record = round_record(run.config, report, report.record, now - self._began)
        if run.session.clock is not None:
            report.record |= run.session.clock.record()
        if run.without:
            report.record["left_out"] = {str(p): why for p, why in run.without.items()}
        self._began = now
        run.directory.append_round(report.record)

    def after_run(self, run: FederatedRun, result: dict[str, Any]) -> None:
        """Complete the result, and write the adapters."""
        records, before = run.directory.rounds(), run.directory.before()
        whole = result_record(run.config, run.runtime.data, records, dict(result), before)
        result.clear()
        result.update(whole | best.chosen(run.config, records))
        if run.config.lora.method != "lora":
            exact = mean_is_exact(run.strategy.rule, run.runtime.model, run.state.adapters)
            result |= {"lora_method": run.config.lora.method, "exact": exact}
        average = bool(run.strategy.rule.facts.uploaded)
        config, path = run.config, run.directory.path
        about = about_run(config, run.runtime, records, here=run.session.nodes is None)
        result |= export(path, config, run.runtime, run.state, _own(run), average=average, about=about)
        if config.lora.personal_rank and run.session.stores is not None:
            found = kept_by(run.session.stores / run.run_key, run.partitions, run.state.round, SECOND)
            export_seconds(path, config, run.runtime, run.strategy.rule, run.state, found, about)
        if config.lora.method == "lora" and config.model.quantization == "none" and not run.personal:
            result |= counted_intruders(run.runtime, run.state)


def _own(run: FederatedRun) -> dict[int, Tensors]:
    """Tensors of the clients' own models, as far as they can be reached: sent to each, and kept by each."""
    found: dict[int, Tensors] = {}
    if run.strategy.rule.facts.by_client:
        specs = [client_spec(run.config, run.runtime, partition) for partition in run.partitions]
        sent = {s.partition_id: run.strategy.rule.broadcast(run.state, s).adapters for s in specs}
        found = {partition: to_peft(adapters, {}) for partition, adapters in sent.items()}
    if not run.personal or run.session.stores is None:
        return found
    kept = kept_by(run.session.stores / run.run_key, run.partitions, run.state.round, OWN)
    return {p: found.get(p, {}) | kept.get(p, {}) for p in sorted(found | kept)}


class Track(Callback):
    """Hands records on to an experiment tracker."""

    def before_run(self, run: FederatedRun) -> None:
        """Open the tracker."""
        self._tracking = Tracking(run.config, run.directory.path)

    def after_round(self, run: FederatedRun, report: RoundReport) -> None:
        """The round's record."""
        self._tracking.log_round(report.record)

    def after_run(self, run: FederatedRun, result: dict[str, Any]) -> None:
        """The result."""
        self._tracking.log_result(result)

    def close(self) -> None:
        """Finish the tracker's run."""
        self._tracking.close()


class Checkpoint(Callback):
    """Writes what the run needs to go on after this round."""

    def after_round(self, run: FederatedRun, report: RoundReport) -> None:
        """Replace the checkpoint."""
        run.directory.save_checkpoint(run.strategy.snapshot(), run.config.save_total_limit)


class KeepBest(Callback):
    """Keeps the model of the best round; after the checkpoint, so that no crash leaves it ahead of that."""

    def before_run(self, run: FederatedRun) -> None:
        """Say what is chosen on, and make up for a crash right after a checkpoint.

        Raises:
            ConfigError: the best round so far is not kept any more: said before the last round, not after it.
        """
        chooses = run.config.load_best_model_at_end or run.config.early_stopping_patience > 0
        if chooses and best.chosen_on(run.config) == "test":
            logging.getLogger("fedlora").warning(
                "the best round is chosen on test examples, so that its figures there are too good "
                "(data.validation-fraction keeps others for that)"
            )
        best.keep(run)
        best.best_state(run)

    def after_round(self, run: FederatedRun, report: RoundReport) -> None:
        """Replace what is kept, if this is the best round so far."""
        best.keep(run)


class Tell(Callback):
    """Calls a function with each round's record.

    Args:
        function: also called with the evaluation before round 1, as round 0.
        begin: called before that with the last round that was done before, and who takes no part and why.
    """

    def __init__(
        self,
        function: Callable[[dict[str, Any]], None],
        begin: Callable[[int, Mapping[int, str]], None] | None = None,
    ) -> None:
        self._function, self._begin = function, begin

    def before_run(self, run: FederatedRun) -> None:
        """Tells where the run stands, and what was measured before round 1, if it just was."""
        if self._begin is not None:
            self._begin(run.state.round, run.without)
        if run.before:
            self._function(run.before)

    def after_round(self, run: FederatedRun, report: RoundReport) -> None:
        """The round's record."""
        self._function(report.record)
