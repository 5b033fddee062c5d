"""The one Flower `Strategy` around all rules: it knows messages and rounds, and no LoRA algebra.

``FLoRA(fraction_train=0.5).start(grid, initial_arrays=ArrayRecord(get_peft_model_state_dict(model)))``
works in anybody's ServerApp. Rules that move the base (see `Facts.moves_base`) need clients that apply
patches: fedlora's ClientApp, or the mod in ``clients.mod`` in an app of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora import wire
from fedlora.errors import ConfigError, FactorShapeError, RunFailed, UpdateRefused
from fedlora.updates import ClientSpec, ClientUpdate, State, Template
from strategies.client_dp import ClientDP
from strategies.courier import ClientSettings, Courier
from strategies.global_adapter import stacked_adapters
from strategies.intake import NUM_EXAMPLES, accept
from strategies.metrics import mean_loss, mean_metrics
from strategies.report import RoundReport
from strategies.roster import Roster
from strategies.rule import Rule
from strategies.sampling import Selection
from strategies.starting import template_of
from strategies.travel import rounded_broadcast, rounded_state

CONNECT_TIMEOUT = 600.0
"""Seconds to wait for ``min_available_nodes``."""


class FactorStrategy(Strategy):
    """Federated LoRA by a `Rule`, as a Flower strategy.

    Args:
        rule: how adapters are aggregated.
        fraction_train, min_train_nodes, partitions, max_participations: who trains, see
            `strategies.sampling.Selection`; a round with fewer valid updates raises `RunFailed`, too.
        min_available_nodes: the run waits for so many clients.
        scaling: alpha / r of the adapters in ``initial_arrays``.
        seed: root of the sampling and of drawn adapters.
        weighted_by_key: the metric that weighs clients; None weighs them equally.
        client_spec: what is settled for each partition; by default everybody has the global rank.
        max_update_norm: an update that moved further is refused; 0 means none is for that.
        clients_evaluate: after which rounds the sampled clients evaluate, each with what it keeps to itself.
        diagnostics: measure each aggregation, see `strategies.diagnostics`; never under client-level privacy,
            which does not cover them.
        client_dp: client-level privacy of the global model, for rules whose aggregate is a mean.
        wire_dtype: ``float32`` or ``float16``, see `strategies.travel`.
        packed, client_settings: see `strategies.courier.Courier`.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
        scaling: float = 1.0,
        seed: int = 0,
        weighted_by_key: str | None = NUM_EXAMPLES,
        client_spec: Callable[[int], ClientSpec] | None = None,
        partitions: Collection[int] | None = None,
        max_participations: int = 0,
        max_update_norm: float = 0.0,
        clients_evaluate: Callable[[int], bool] = lambda server_round: False,
        diagnostics: bool = True,
        client_dp: ClientDP | None = None,
        wire_dtype: str = "float32",
        packed: bool = False,
        client_settings: ClientSettings = lambda partition_id: {},
    ) -> None:
        self.rule = rule
        self.selection = Selection(
            fraction_train=fraction_train,
            min_train_nodes=min_train_nodes,
            seed=seed,
            partitions=partitions,
            max_participations=max_participations,
        )
        self.min_available_nodes = min_available_nodes
        self.scaling = scaling
        self.seed = seed
        self._accept = partial(accept, weighted_by_key=weighted_by_key, max_update_norm=max_update_norm)
        self.client_spec = client_spec or self._default_spec
        self.clients_evaluate = clients_evaluate
        if client_dp is not None and not rule.facts.client_dp:
            raise ConfigError(f"client_dp: the aggregate of {rule.facts.name} is no mean of what is shipped")
        self.client_dp = client_dp
        self.diagnostics = diagnostics and client_dp is None and rule.facts.global_adapter
        self.state: State | None = None
        self.roster = Roster(closed=partitions is not None)
        self.courier = Courier(rule.init_a, wire_dtype, packed=packed, client_settings=client_settings)
        self._dtype: torch.dtype = getattr(torch, wire_dtype)
        self.on_round: Callable[[RoundReport], None] | None = None
        self.report = RoundReport(server_round=0)

    # --- Flower's loop ----------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds after ``self.state.round`` up to ``num_rounds``; arguments as in Flower.

        Returns:
            Flower's Result; its ``arrays`` are `arrays` after the last round.

        Raises:
            RunFailed: too few clients connected, or too few valid updates in a round.
        """
        if self.state is None:
            self.state = self.begin(template_of(initial_arrays, self.scaling, self.rule.init_a))
        self.summary()
        result, arrays = Result(), self.arrays()
        for server_round in range(self.state.round + 1, num_rounds + 1):
            self.report = RoundReport(server_round=server_round)
            train, evaluate = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
            arrays = self._train_round(server_round, arrays, grid, timeout, train, result)
            if self.clients_evaluate(server_round):
                self._evaluate_round(server_round, arrays, grid, timeout, evaluate, result)
            if evaluate_fn is not None:
                metrics = evaluate_fn(server_round, arrays)
                if metrics is not None:
                    result.evaluate_metrics_serverapp[server_round] = metrics
            if self.on_round is not None:
                self.on_round(self.report)
        result.arrays = arrays
        return result

    def begin(self, template: Template) -> State:
        """The state before round 1."""
        return rounded_state(self.rule.init(template, self.seed), self._dtype)

    def _train_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float, config: ConfigRecord,
        result: Result,
    ) -> ArrayRecord:  # fmt: skip
        messages = self.configure_train(server_round, arrays, config, grid)
        sent = _config(config, server_round)
        replies = self.courier.exchange(grid, messages, MessageType.TRAIN, sent, timeout)
        after, metrics = self.aggregate_train(server_round, replies)
        if metrics is not None:
            result.train_metrics_clientapp[server_round] = metrics
        return arrays if after is None else after

    def _evaluate_round(
        self, server_round: int, arrays: ArrayRecord, grid: Grid, timeout: float, config: ConfigRecord,
        result: Result,
    ) -> None:  # fmt: skip
        messages = self.configure_evaluate(server_round, arrays, config, grid)
        sent = _config(config, server_round)
        replies = self.courier.exchange(grid, messages, MessageType.EVALUATE, sent, timeout)
        metrics = self.aggregate_evaluate(server_round, replies)
        if metrics is not None:
            result.evaluate_metrics_clientapp[server_round] = metrics

    # --- Flower's hooks -----------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The orders of one round; ``arrays`` is ignored, ``self.state`` is what counts."""
        present = self.roster.refresh(grid, self.min_available_nodes, CONNECT_TIMEOUT)
        for partition_id, reason in self.roster.refused.items():
            self.report.refused[partition_id] = reason
            log(WARNING, "\tpartition %s refused: %s", partition_id, reason)
        chosen = self.selection.choose(present, server_round)
        return self._orders(chosen, present, MessageType.TRAIN, server_round, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the valid updates; the others are counted in ``self.report.refused``.

        Raises:
            RunFailed: fewer valid updates than ``min_train_nodes``.
        """
        updates = self._accepted(replies)
        wanted = self.selection.min_train_nodes
        if len(updates) < wanted:
            reasons = "; ".join(f"partition {p}: {r}" for p, r in self.report.refused.items())
            raise RunFailed(
                f"round {server_round}: {len(updates)} valid updates, min-train-nodes = "
                f"{wanted} ({reasons or 'no replies'})"
            )
        assert self.state is not None
        counted = updates
        if self.client_dp is not None:
            sent = {parcel.partition_id: parcel.broadcast for parcel in self.courier.parcels}
            counted = self.client_dp.privatise(updates, sent, len(sent), server_round)
        state, self.report.diagnostics = self.rule.aggregate(
            self.state, counted, diagnostics=self.diagnostics
        )
        self.state = rounded_state(state, self._dtype)
        self.report.participants = [update.partition_id for update in updates]
        self.report.train_loss = mean_loss(self.courier.parcels, updates)
        measured = self.report.diagnostics.as_dict() if self.report.diagnostics else {}
        return self.arrays(), MetricRecord({**measured, "num-updates": len(updates)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Orders to evaluate the new global model, for the clients of this round's training."""
        present = {parcel.partition_id: parcel.node_id for parcel in self.courier.parcels}
        return self._orders(sorted(present), present, MessageType.EVALUATE, server_round, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Each client's metrics go into the report; returned are the means of those that all have."""
        self.courier.settle(replies)
        self._count_bytes()
        answers = {p.partition_id: p.reply for p in self.courier.parcels if p.reply is not None}
        self.report.client_metrics = {
            partition: reply.metrics for partition, reply in answers.items() if NUM_EXAMPLES in reply.metrics
        }
        means = mean_metrics(list(self.report.client_metrics.values()))
        return MetricRecord({**means}) if means else None

    def summary(self) -> None:
        """Log the settings, as Flower's strategies do."""
        facts = self.rule.facts
        log(INFO, "\t├──> %s (%s)", facts.title, facts.paper)
        log(INFO, "\t├──> %s", self.rule)
        log(INFO, "\t└──> %s", self.selection)

    # --- pieces ---------------------------------------------------------------------------------------

    def arrays(self) -> ArrayRecord:
        """The whole global model over the pristine base: adapter and head under PEFT's keys.

        Base patches are in it, see `strategies.global_adapter`: after them a layer's rank may be any up to
        min(out, in), and its scaling is ``self.scaling`` as before. `strategies.arrays` loads such arrays
        into a PEFT model and writes PEFT's directories.
        """
        assert self.state is not None
        return wire.to_record(wire.to_peft(stacked_adapters(self.state), self.state.head))

    def _default_spec(self, partition_id: int) -> ClientSpec:
        assert self.state is not None
        first = next(iter(self.state.adapters.values()))
        return ClientSpec(partition_id=partition_id, rank=first.rank, scaling=self.scaling)

    def _orders(
        self, chosen: list[int], present: dict[int, int], message_type: str, server_round: int,
        config: ConfigRecord,
    ) -> list[Message]:  # fmt: skip
        assert self.state is not None
        self.courier.open(self.state.base)
        for partition_id in chosen:
            broadcast = self.rule.broadcast(self.state, self.client_spec(partition_id))
            broadcast = rounded_broadcast(broadcast, self._dtype)
            self.courier.add(partition_id, present[partition_id], broadcast)
        return self.courier.messages(message_type, _config(config, server_round))

    def _accepted(self, replies: Iterable[Message]) -> list[ClientUpdate]:
        self.courier.settle(replies)
        self._count_bytes()
        updates = []
        for parcel in self.courier.parcels:
            try:
                updates.append(self._accept(parcel))
            except (UpdateRefused, FactorShapeError) as error:
                self.report.refused[parcel.partition_id] = str(error)
                log(WARNING, "\tpartition %s refused: %s", parcel.partition_id, error)
                continue
            self.report.note(parcel.partition_id, parcel.reply)
        return updates

    def _count_bytes(self) -> None:
        self.report.bytes_up += sum(parcel.bytes_up for parcel in self.courier.parcels)
        self.report.bytes_down += sum(parcel.bytes_down for parcel in self.courier.parcels)


def _config(config: ConfigRecord, server_round: int) -> dict[str, Any]:
    return {**config, "server-round": server_round}
