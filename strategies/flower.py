"""The one Flower `Strategy` around all rules: it knows messages and rounds, and no LoRA algebra.

``FLoRA(fraction_train=0.5).start(grid, initial_arrays=ArrayRecord(get_peft_model_state_dict(model)))``
works in anybody's ServerApp. Rules that move the base (see `Facts.updates_base`) need clients that apply
patches: fedlora's ClientApp, or the mod in ``clients.mod`` in an app of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from logging import INFO
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora import wire
from fedlora.core.state import ClientSpec, ClientUpdate
from fedlora.errors import ConfigError, FactorShapeError, RunFailed, UpdateRefused
from strategies.adaptive_dp import AdaptiveClientDP
from strategies.client_dp import ClientDP
from strategies.loop import Rounds, settings_of
from strategies.metrics import MetricsFn, aggregated, mean_loss
from strategies.nodes import CONNECT_TIMEOUT, NodeDirectory
from strategies.patience import Patience
from strategies.precision import padded, rounded_broadcast
from strategies.replies import NUM_EXAMPLES, KnownExamples, evaluations, validate_reply
from strategies.report import RoundReport
from strategies.request import PendingRequest
from strategies.rule import Rule
from strategies.sampling import Selection
from strategies.screening import Screening, aggregate_screened
from strategies.transport import Transport
from strategies.uploads import checked_upload, codec_of
from strategies.wrapped import watch_flowers_wrappers


class FactorStrategy(Rounds):
    """Federated LoRA by a `Rule`, as a Flower strategy.

    Args:
        rule: how adapters are aggregated.
        fraction_train, min_train_nodes, fraction_evaluate, min_evaluate_nodes, partitions,
            max_participations: who trains and evaluates, see `strategies.sampling.Selection`; a round with
            fewer valid updates than ``min_train_nodes`` raises `RunFailed`, too.
        min_available_nodes: the run waits for so many clients.
        weighted_by_key: the metric that weighs clients; None weighs them equally.
        arrayrecord_key, configrecord_key: names of the records in the instructions.
        train_metrics_aggr_fn, evaluate_metrics_aggr_fn: what makes one record of the clients' metrics, as in
            Flower; by default `strategies.metrics.mean_metrics`.
        scaling: alpha / r of the adapters in ``initial_arrays``.
        rank: of the adapters that clients train; 0 is that of ``initial_arrays``.
        seed: root of the sampling and of drawn adapters.
        client_spec: what is settled for each partition; by default everybody has the global rank.
        max_update_norm: an update that moved further is refused; 0 means none is for that.
        known_examples: the most examples that a partition can claim, as far as they are known here.
        screening: bounds on a client's weight and way beside the others'; None compares nobody.
        clients_evaluate: after which rounds clients evaluate, each with what it keeps to itself.
        keep_ranks: a client whose rank a rule prunes is sent zeros there, as a PEFT model keeps its rank.
        diagnostics: measure each aggregation, see `strategies.diagnostics`; never under client-level privacy.
        client_dp: client-level privacy of the global model, for rules whose aggregate is a mean.
        wire_dtype: ``float32`` or ``float16``, see `strategies.precision`.
        upload: how clients write down what they send, see `fedlora.wire.upload`; empty: as ``wire_dtype``.
        packed: see `strategies.transport.Transport`.
        node_directory: who is who among the connected nodes; by default what they say, see `NodeDirectory`.
        max_missed_rounds: silent rounds in a row after which a node is set aside, see `Patience`; 0: never.

    Raises:
        ConfigError: a value out of range, or settings that exclude each other.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float | None = 1.0,
        min_train_nodes: int = 1,
        min_evaluate_nodes: int = 1,
        min_available_nodes: int = 1,
        weighted_by_key: str | None = NUM_EXAMPLES,
        arrayrecord_key: str = wire.ARRAYS,
        configrecord_key: str = wire.CONFIG,
        train_metrics_aggr_fn: MetricsFn | None = None,
        evaluate_metrics_aggr_fn: MetricsFn | None = None,
        scaling: float = 1.0,
        rank: int = 0,
        seed: int = 0,
        client_spec: Callable[[int], ClientSpec] | None = None,
        partitions: Collection[int] | None = None,
        max_participations: int = 0,
        max_update_norm: float = 0.0,
        known_examples: KnownExamples = lambda partition: None,
        screening: Screening | None = None,
        clients_evaluate: Callable[[int], bool] = lambda server_round: True,
        diagnostics: bool = True,
        client_dp: ClientDP | AdaptiveClientDP | None = None,
        wire_dtype: str = "float32",
        upload: str = "",
        packed: bool = False,
        keep_ranks: bool = True,
        node_directory: NodeDirectory | None = None,
        max_missed_rounds: int = 0,
    ) -> None:
        self.rule = rule
        self.selection = Selection(
            fraction_train=fraction_train,
            min_train_nodes=min_train_nodes,
            fraction_evaluate=fraction_evaluate,
            min_evaluate_nodes=min_evaluate_nodes,
            seed=seed,
            partitions=partitions,
            max_participations=max_participations,
            separation=1 if client_dp is None else client_dp.bands,
        )
        self.min_available_nodes = min_available_nodes
        self.scaling, self.rank, self.seed = scaling, rank, seed
        self.weighted_by_key = weighted_by_key
        if weighted_by_key is None and (train_metrics_aggr_fn or evaluate_metrics_aggr_fn):
            raise ConfigError(
                "weighted_by_key = None: functions that aggregate metrics are given a key, name one"
            )
        self.train_metrics_aggr_fn = train_metrics_aggr_fn
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn
        self._accept = partial(
            validate_reply, facts=rule.facts, weighted_by_key=weighted_by_key,
            max_update_norm=max_update_norm, known_examples=known_examples,
        )  # fmt: skip
        self.screening = screening
        self.own_specs = client_spec is not None
        self.client_spec = client_spec or self._default_spec
        self.clients_evaluate = clients_evaluate
        if client_dp is not None:
            client_dp.check(rule)
        if client_dp is not None and screening is not None:
            raise ConfigError("client_dp: screening leaves clients out by updates, which no noise covers")
        self.client_dp = client_dp
        self.diagnostics = diagnostics and client_dp is None and rule.facts.global_adapter
        self.node_directory = node_directory or NodeDirectory(closed=partitions is not None)
        self.patience = Patience(max_missed_rounds)
        self.keep_ranks = keep_ranks and not rule.allocation.parts
        self.transport = Transport(
            rule.init_a, wire_dtype, seed=seed, packed=packed,
            upload=checked_upload(codec_of(upload, rule, wire_dtype), rule, client_dp=client_dp is not None),
            arrayrecord_key=arrayrecord_key, configrecord_key=configrecord_key,
        )  # fmt: skip
        self._dtype: torch.dtype = getattr(torch, wire_dtype)
        self.report = RoundReport(server_round=0)

    # --- Flower's hooks -----------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The instructions of one round, made from ``self.state``, into which changed arrays are taken."""
        self.report = RoundReport(server_round=server_round)
        self._take(arrays)
        if self.selection.fraction_train == 0:
            return self._instructions([], {}, MessageType.TRAIN, server_round, config)
        present = self._present(grid, self.selection.min_train_nodes)
        present, aside = self.patience.without_hanging(present, server_round, self.selection.min_train_nodes)
        self.report.refuse(self.node_directory.refused | aside)
        chosen = self.selection.choose(present, server_round)
        log(INFO, "configure_train: %s of %s clients", len(chosen), len(present))
        return self._instructions(chosen, present, MessageType.TRAIN, server_round, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the valid updates; the others are counted in ``self.report.refused``.

        Returns:
            The global arrays, and the means of the clients' metrics over the valid updates; None and None
            where nobody was asked, or nobody answered and ``min_train_nodes`` is 0.

        Raises:
            RunFailed: fewer valid updates than ``min_train_nodes``, or a private aggregate is not finite.
        """
        contents = self.transport.settle(replies)
        self.patience.note(server_round, {r.partition_id: r.is_silent for r in self.transport.requests})
        starts = {request.partition_id: request.broadcast for request in self.transport.requests}
        wanted, private = self.selection.min_train_nodes, self.client_dp is not None
        aggregate, accepted = partial(self._next_state, starts), self._accepted()
        done = aggregate_screened(aggregate, accepted, starts, self.screening, least=wanted, once=private)
        self.report.refuse(done.refused)
        if self.transport.requests and len(done.updates) < wanted:
            raise RunFailed(
                f"round {server_round}: {len(done.updates)} valid updates, min-train-nodes = "
                f"{wanted} ({self.report.refusals() or 'no replies'})"
            )
        if done.state is None:
            return None, None
        self.state, self.report.diagnostics = done.state, done.diagnostics
        self.report.participants = [update.partition_id for update in done.updates]
        self.report.train_loss = mean_loss(self.transport.requests, done.updates)
        self._released = self.arrays()
        counted_in = [contents[partition] for partition in sorted(self.report.participants)]
        return self._released, aggregated(self.train_metrics_aggr_fn, counted_in, self.weighted_by_key)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Orders to evaluate the new global model; nobody is asked where ``clients_evaluate`` says no."""
        self._take(arrays)
        chosen, present = list[int](), self.patience.answering(self.transport.requests)
        if self.clients_evaluate(server_round):
            chosen, share = sorted(present), self.selection.fraction_evaluate
            if share is not None:
                present = self._present(grid, self.selection.min_evaluate_nodes) if share > 0 else {}
                chosen = self.selection.evaluators(present, server_round)
        return self._instructions(chosen, present, MessageType.EVALUATE, server_round, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Each client's metrics go into the report where all are finite; returned are their means."""
        contents = self.transport.settle(replies, trained=False)
        self._count_bytes()
        measured = {}
        for request, metrics in evaluations(self.transport.requests, self.weighted_by_key):
            measured[request.partition_id] = metrics
            self.report.note(request.partition_id, request.reply)
            self.transport.note_ledger(request)
        self.report.client_metrics = {
            p: m for p, m in measured.items() if NUM_EXAMPLES in m and all(map(math.isfinite, m.values()))
        }
        counted_in = [contents[partition] for partition in sorted(measured)]
        if not counted_in:
            return None
        return aggregated(self.evaluate_metrics_aggr_fn, counted_in, self.weighted_by_key)

    def summary(self) -> None:
        """Log the settings, as Flower's strategies do."""
        facts = self.rule.facts
        log(INFO, "\t├──> %s (%s)", facts.title, facts.paper)
        log(INFO, "\t├──> %s", self.rule)
        log(INFO, "\t├──> %s, available %s", self.selection, self.min_available_nodes)
        log(INFO, "\t├──> weighted by: %r, screening: %s", self.weighted_by_key, self.screening)
        log(
            INFO,
            "\t└──> keys in records: %r",
            (self.transport.arrayrecord_key, self.transport.configrecord_key),
        )

    # --- pieces ---------------------------------------------------------------------------------------

    def _default_spec(self, partition_id: int) -> ClientSpec:
        assert self.state is not None
        first = next(iter(self.state.adapters.values()))
        return ClientSpec(partition_id=partition_id, rank=first.rank, scaling=self.scaling)

    def _present(self, grid: Grid, wanted: int) -> dict[int, int]:
        """Connected partitions; where anybody may take part the run waits for as many as a round wants."""
        minimum = max(self.min_available_nodes, wanted if self.selection.partitions is None else 0)
        return self.node_directory.refresh(grid, minimum, CONNECT_TIMEOUT)

    def _instructions(
        self, chosen: list[int], present: dict[int, int], message_type: str, server_round: int,
        config: ConfigRecord,
    ) -> list[Message]:  # fmt: skip
        assert self.state is not None
        self.transport.open(self.state.base)
        for partition_id in chosen:
            client = self.client_spec(partition_id)
            broadcast = rounded_broadcast(self.rule.broadcast(self.state, client), self._dtype)
            rank = next(iter(broadcast.adapters.values())).rank
            kept = rank if self.keep_ranks and rank < client.rank else 0
            sent = padded(broadcast, client.rank) if kept else broadcast
            self.transport.add(partition_id, present[partition_id], sent, kept)
        return self._messages(message_type, settings_of(config, server_round))

    def _messages(self, message_type: str, settings: dict[str, Any]) -> list[Message]:
        """The messages of all instructions."""
        return self.transport.messages(message_type, settings)

    def _accepted(self) -> list[ClientUpdate]:
        self._count_bytes()
        updates = []
        for request in self.transport.requests:
            self._note(request)
            try:
                updates.append(self._accept(request))
            except (UpdateRefused, FactorShapeError) as error:
                self.report.refuse({request.partition_id: str(error)})
        return updates

    def _note(self, request: PendingRequest) -> None:
        """Notes what a client has spent on what it sent, whether or not that can be used."""
        if request.reply is not None and request.reply.status == wire.OK:
            self.report.note(request.partition_id, request.reply)
            self.transport.note_ledger(request)

    def _count_bytes(self) -> None:
        self.report.bytes_up += sum(request.bytes_up for request in self.transport.requests)
        self.report.bytes_down += sum(request.bytes_down for request in self.transport.requests)


watch_flowers_wrappers(lambda strategy: isinstance(strategy, FactorStrategy))
