"""The ServerApp: a configuration becomes a strategy, its rounds become a run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from clients.carry_out import ACCURACY_IN, EXAMPLES_IN, NUM_EXAMPLES
from clients.evaluation import Evaluation, evaluate
from clients.private import check_private
from clients.resident import Resident, configured, resident
from fedlora.config import RunConfig, int_list
from fedlora.data.examples import evaluation_subset
from fedlora.errors import ConfigError, RunFailed
from fedlora.models import AdapterCard, save_adapter
from fedlora.runs import Checkpoint, RunDirectory
from fedlora.updates import ClientSpec, State
from strategies.flower import FactorStrategy
from strategies.registry import RULES, make_rule
from strategies.report import RoundReport
from strategies.rule import Rule

app = ServerApp()

Progress = Callable[[dict[str, Any]], None]
"""Called with each round's record, as it is written to ``rounds.jsonl``."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run under ``flwr run``; results go to ``output-dir``, else into ``runs/flwr-<run id>``."""
    config = configured(context.run_config)
    path = Path(config.output_dir or f"runs/flwr-{context.run_id}").absolute()
    Federation(config, RunDirectory(path)).run(grid)


def check(config: RunConfig) -> Rule:
    """The rule of a configuration, after refusing combinations that cannot work.

    Raises:
        ConfigError: an unknown strategy or option, mixed ranks for a rule that cannot take them, or a
            setting that privacy excludes.
    """
    rule = make_rule(config.strategy.name, config.strategy.option_dict)
    ranks = set(config.lora.rank_list) | {g.rank for g in config.groups if g.rank is not None}
    if len(ranks) > 1 and not rule.facts.mixed_ranks:
        able = ", ".join(name for name, r in RULES.items() if r.facts.mixed_ranks)
        raise ConfigError(
            f"lora.ranks: {rule.facts.name} needs equal ranks, not {sorted(ranks)} (mixed: {able})"
        )
    if config.privacy.private:
        check_private(config.train, num_examples=config.train.batch_size)
    if not rule.facts.trains and config.model.head == "freeze":
        raise ConfigError(f"model.head = 'freeze': {rule.facts.name} would train nothing")
    return rule


@dataclass(slots=True)
class Federation:
    """One run: everything between a Grid and a run directory.

    Attributes:
        config: what to do.
        directory: where the results go; a checkpoint in it is resumed.
        progress: told about each round.
    """

    config: RunConfig
    directory: RunDirectory
    progress: Progress | None = None
    worker: Resident = field(init=False)
    strategy: FactorStrategy = field(init=False)
    run_key: str = field(init=False, default="")
    _began: float = field(init=False, default=0.0)
    _whole: Evaluation | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        rule = check(self.config)
        self.worker = resident(self.config)
        self.strategy = self._strategy(rule)
        self.directory.open(self.config)
        self._restore()

    @property
    def partitions(self) -> Collection[int]:
        """The partitions that may take part."""
        count = self.worker.data.num_partitions
        chosen = int_list("partitions", self.config.partitions) or range(count)
        if max(chosen) >= count:
            raise ConfigError(
                f"partitions = {self.config.partitions!r}: the data has partitions 0 to {count - 1}"
            )
        return chosen

    def run(self, grid: Grid) -> dict[str, Any]:
        """All remaining rounds, then the whole test set and the adapter; returns the result record.

        Raises:
            RunFailed: too few clients or valid updates; what was written before is kept.
        """
        self._began = time.monotonic()
        strategy = self.strategy
        strategy.on_round = self._after_round
        settings = ConfigRecord({"run-key": self.run_key})
        strategy.start(
            grid,
            strategy.arrays(),
            num_rounds=self.config.num_server_rounds,
            timeout=self.config.round_timeout,
            train_config=settings,
            evaluate_config=settings,
        )
        return self._finish()

    # --- before ------------------------------------------------------------------------------------

    def _strategy(self, rule: Rule) -> FactorStrategy:
        config = self.config
        ranks = {config.rank_of(p) for p in self.partitions}
        for rank in sorted(ranks):
            self.worker.model.check_rank(rank)
        if config.privacy.private:
            for partition in self.partitions:
                check_private(config.train, len(self.worker.data.indices(partition)))
        strategy = FactorStrategy(
            rule,
            fraction_train=config.fraction_train,
            min_train_nodes=config.min_train_nodes,
            min_available_nodes=config.min_available_nodes,
            seed=config.seed,
            weighted_by_key=None if config.privacy.private else "num-examples",
            client_spec=self._client_spec,
            partitions=frozenset(self.partitions),
            max_participations=config.privacy.max_participations if config.privacy.private else 0,
            clients_evaluate=lambda server_round: self.personal and self._is_measured(server_round),
        )
        rank = max(ranks)
        template = self.worker.model.template(
            rank, config.lora.scaling(rank), share_head=config.model.head == "train"
        )
        strategy.state = rule.init(template, config.seed)
        return strategy

    def _client_spec(self, partition_id: int) -> ClientSpec:
        rank = self.config.rank_of(partition_id)
        group = self.config.group_of(partition_id)
        modules = None
        if group is not None and group.target_modules is not None:
            modules = frozenset(self.worker.modules[group.target_modules])
        return ClientSpec(
            partition_id=partition_id,
            rank=rank,
            scaling=self.config.lora.scaling(rank, self.config.alpha_of(partition_id)),
            modules=modules,
        )

    def _restore(self) -> None:
        checkpoint = self.directory.load_checkpoint()
        if checkpoint is None:
            self.run_key = uuid4().hex
            self.directory.keep_rounds(0)
            return
        self.run_key = checkpoint.run_key
        self.strategy.state = checkpoint.state
        self.strategy.participations = checkpoint.participations
        self.strategy.courier.holdings = checkpoint.holdings
        self.directory.keep_rounds(checkpoint.state.round)

    # --- after each round ----------------------------------------------------------------------------

    @property
    def personal(self) -> bool:
        """Clients keep something trained to themselves, so that only they can measure their models."""
        return self.config.model.head == "local" or self.strategy.rule.facts.personal

    @property
    def state(self) -> State:
        assert self.strategy.state is not None
        return self.strategy.state

    def _after_round(self, report: RoundReport) -> None:
        config, server_round = self.config, report.server_round
        measured: dict[str, Any] = {"accuracy": None, "loss": None}
        if self._is_measured(server_round):
            measured = self._measure(report)
        epsilons = {str(p): spent["epsilon"] for p, spent in sorted(report.privacy.items())}
        now = time.monotonic()
        record = {
            "round": server_round,
            "strategy": config.strategy.name,
            **measured,
            "train_loss": report.train_loss,
            "bytes_up": report.bytes_up,
            "bytes_down": report.bytes_down,
            "seconds": round(now - self._began, 3),
            "private": config.privacy.private,
            "epsilon": max(epsilons.values(), default=None),
            "epsilon_by_client": epsilons,
            **(report.diagnostics.as_dict() if report.diagnostics else {}),
            "participants": report.participants,
            "refused": {str(p): reason for p, reason in report.refused.items()},
        }
        self._began = now
        self.directory.append_round(record)
        self.directory.save_checkpoint(
            Checkpoint(self.state, self.strategy.participations, self.strategy.courier.holdings, self.run_key)
        )
        if self.progress is not None:
            self.progress(record)

    def _is_measured(self, server_round: int) -> bool:
        return server_round % self.config.evaluate_every == 0 or server_round == self.config.num_server_rounds

    def _measure(self, report: RoundReport) -> dict[str, Any]:
        """The global model on the fixed subset; without one, each client's model on its own domains."""
        if self.personal:
            return personal_summary(report.client_metrics, self.worker.data.domain_names)
        subset = evaluation_subset(self.worker.data.test, self.config.data.evaluate_examples)
        if report.server_round < self.config.num_server_rounds:
            return summary(self._evaluate(subset), self.worker.data.domain_names)
        self._whole = self._evaluate(np.arange(len(self.worker.data.test)))
        return summary(self._whole.among(subset), self.worker.data.domain_names)

    def _evaluate(self, indices: Any) -> Evaluation:
        worker, state = self.worker, self.state
        patches = {patch.digest(): patch for patch in state.base}
        worker.move_to(tuple(patches), patches.__getitem__)
        worker.model.load(state.adapters, state.head)
        return evaluate(worker.model, worker.data.test, indices, worker.data.pad_token_id)

    # --- at the end ------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        data, records = self.worker.data, self.directory.rounds()
        measured = ("accuracy", "loss", "accuracy_by_domain", "examples")
        outcome: dict[str, Any] = {key: records[-1][key] for key in measured}
        if not self.personal:
            whole = self._whole or self._evaluate(np.arange(len(data.test)))
            outcome = summary(whole, data.domain_names)
        labels = np.bincount(data.test.labels, minlength=data.num_labels)
        result = {
            "strategy": self.config.strategy.name,
            "rounds": len(records),
            **outcome,
            "majority_accuracy": float(labels.max() / labels.sum()),
            "epsilon": max((r["epsilon"] for r in records if r["epsilon"] is not None), default=None),
            "epsilon_by_client": {p: e for r in records for p, e in r["epsilon_by_client"].items()},
            "bytes_up": sum(r["bytes_up"] for r in records),
            "bytes_down": sum(r["bytes_down"] for r in records),
            "seconds": round(sum(r["seconds"] for r in records), 3),
            "labels": list(data.label_names),
        }
        card = AdapterCard(
            model=self.config.model,
            label_names=tuple(data.label_names),
            max_length=self.config.data.max_length,
            seed=self.config.seed,
        )
        model = self.worker.model
        save_adapter(
            self.directory.path / "adapter", self.state, model.initial_head, card,
            fan_in_fan_out=model.fan_in_fan_out,
        )  # fmt: skip
        self.directory.write_result(result)
        return result


def summary(outcome: Evaluation, domain_names: Sequence[str]) -> dict[str, Any]:
    """An evaluation as a record: accuracy, loss, accuracy by domain, examples."""
    return {
        "accuracy": outcome.accuracy,
        "loss": outcome.loss,
        "accuracy_by_domain": {domain_names[d]: a for d, a in outcome.accuracy_by_domain().items() if d >= 0},
        "examples": outcome.num_examples,
    }


def personal_summary(
    metrics: Mapping[int, Mapping[str, float]], domain_names: Sequence[str]
) -> dict[str, Any]:
    """Clients' evaluations of their own models as a record, means over examples."""
    total = sum(m[NUM_EXAMPLES] for m in metrics.values())
    if total == 0:
        raise RunFailed("no client could be evaluated")
    by_domain = {}
    for number, name in enumerate(domain_names):
        counted = [m for m in metrics.values() if f"{EXAMPLES_IN}{number}" in m]
        seen = sum(m[f"{EXAMPLES_IN}{number}"] for m in counted)
        if seen:
            right = sum(m[f"{EXAMPLES_IN}{number}"] * m[f"{ACCURACY_IN}{number}"] for m in counted)
            by_domain[name] = right / seen
    return {
        "accuracy": sum(m[NUM_EXAMPLES] * m["accuracy"] for m in metrics.values()) / total,
        "loss": sum(m[NUM_EXAMPLES] * m["loss"] for m in metrics.values()) / total,
        "accuracy_by_domain": by_domain,
        "examples": int(total),
        "accuracy_by_client": {str(p): m["accuracy"] for p, m in sorted(metrics.items())},
    }
