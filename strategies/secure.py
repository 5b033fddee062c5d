"""Rounds of which the server learns sums alone: secure aggregation (`fedlora.secure`) around a rule.

A round is four exchanges: keys, sealed shares, orders to train with their masked replies, and the shares that
take the masks off their sum; one more where nodes sign who is in it. The rule is then given one update.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from logging import WARNING
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedlora import wire
from fedlora.core.factors import Tensors
from fedlora.core.state import ClientSpec
from fedlora.errors import ConfigError, RunFailed, SecureRefused, UpdateRefused
from fedlora.secure.collector import Collector
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.masks import Unsigned
from fedlora.secure.noise import SharedNoise
from fedlora.secure.participant import Terms
from fedlora.secure.peers import PUBLIC, SURVIVORS, Peers, to_sign
from fedlora.secure.step import ADVERTISE, CONFIRM, SECURE, SHARE, STEP, UNMASK, Step, step_of
from strategies.flower import FactorStrategy
from strategies.loop import settings_of
from strategies.metrics import TRAIN_LOSS
from strategies.request import PendingRequest
from strategies.sums import Shipped, rows_of, seen_alone, tell_starts, told_by_sums

COARSE = 0.1
"""Share of the mean change beyond which its rounding is warned of."""
Steps = Mapping[int, Mapping[str, Any]]
"""Partition -> what it is asked."""


class SecureStrategy(FactorStrategy):
    """Strategy of a rule of sums.

    Args:
        arguments, named: as of `FactorStrategy`.
        terms: of each round.
        largest_change: by which a number may change.
        max_weight: the most that a client may weigh.
        shared_noise: of so many clients that may be in a sum, where each clips and noises its own update.
        sketch_size: columns and rows of sketches; 0: enough for the ranks of all clients together.
        timeout: seconds for each exchange but that of training.
        peers: the registered nodes' keys, with which they sign; None: nobody signs.
        acting: what of the run's configuration acts on a partition's update, as its client spells it.
        diagnostics: measure what sums tell of each aggregation, see `told_by_sums`.

    Raises:
        ConfigError: a rule that needs single updates.
    """

    def __init__(
        self, *arguments: Any, terms: Terms, acting: Callable[[int], str], largest_change: float,
        max_weight: int, shared_noise: Callable[[int], SharedNoise] | None = None, sketch_size: int = 0,
        timeout: float = 3600, peers: Peers | None = None, diagnostics: bool = True, **named: Any,
    ) -> None:  # fmt: skip
        super().__init__(*arguments, **named)
        self.diagnostics = diagnostics and self.diagnostics and told_by_sums(self.rule) and not shared_noise
        if not self.rule.facts.secure_sum:
            raise ConfigError(f"secure sums: {self.rule.facts.name} needs single updates")
        if self.screening is not None or self.client_dp is not None:
            raise ConfigError("secure sums: screening and client-level privacy need single updates")
        self.terms, self.timeout, self.peers, self.acting = terms, timeout, peers, acting
        self.largest_change, self.max_weight = largest_change, max_weight
        self.shared_noise, self._planned = shared_noise, 0
        self.sketch_size = sketch_size
        self._rows, self._length = Shipped(), 0
        self.collector = Collector(terms=terms)
        self._grid: Grid | None = None
        self._nodes, self._silent = dict[int, int](), dict[int, bool]()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The instructions to the clients that have exchanged keys and shares before."""
        self._grid = grid
        return super().configure_train(server_round, arrays, config, grid)

    def _instructions(
        self, chosen: list[int], present: dict[int, int], message_type: str, server_round: int,
        config: ConfigRecord,
    ) -> list[Message]:  # fmt: skip
        self.transport.beside, self.transport.row_bytes = {}, 0
        if message_type == MessageType.TRAIN and chosen:
            assert self.state is not None
            self._planned = len(chosen)
            named = wire.identity(settings_of(config, server_round))
            chosen = self._agree(named, {partition: present[partition] for partition in chosen})
            clients = self._unshown(chosen, server_round)
            self._rows = rows_of(self.rule, self.state, clients, self.sketch_size)
            asked: dict[str, Any] = {"session": self.collector.session, "sharers": chosen, **self._rows.asked}
            for partition in chosen:
                record = ConfigRecord({**asked, "max-weight": self.max_weight})
                if sealed := self.collector.sealed_for(partition):
                    record["from"], record["sealed"] = list(sealed), list(sealed.values())
                self.transport.beside[partition] = record
        messages = super()._instructions(chosen, present, message_type, server_round, config)
        if self.transport.beside:
            start = self._rows.start(self.transport.requests[0].broadcast)
            self._length = wire.row_length(start, noisy=self.shared_noise is not None)
            self.transport.row_bytes = self._length * self.terms.bits // 8
        return messages

    def _messages(self, message_type: str, settings: dict[str, Any]) -> list[Message]:
        if self.transport.beside:
            self.collector.begun = tell_starts(self.transport, settings, self.acting)
        return super()._messages(message_type, settings)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the mean of the valid updates, once the masks are off their sum.

        Raises:
            RunFailed: fewer clients than a sum may be of, or than ``min_train_nodes``, are left in some step.
        """
        contents = self.transport.settle(replies)
        if not self.transport.requests:
            return None, None
        start = self._rows.start(self.transport.requests[0].broadcast)
        for request in self.transport.requests:
            self._take_update(request, contents.get(request.partition_id))
            self._silent[request.partition_id] = request.is_silent
        self._count_bytes()
        survivors = sorted(self.collector.survivors)
        if len(survivors) < self.selection.min_train_nodes:
            raise RunFailed(
                f"round {server_round}: {len(survivors)} masked updates, min-train-nodes = "
                f"{self.selection.min_train_nodes} ({self.report.refusals() or 'no replies'})"
            )
        self.collector.close_masked()
        self._unshown(survivors, server_round)
        self._unmask(survivors)
        self.patience.note(server_round, self._silent)
        try:
            summed = self._read(self.collector.total(), start)
        except SecureRefused as error:
            raise RunFailed(f"round {server_round}: {error}") from None
        key = f"secure.largest-change = {self.largest_change}"
        if summed.cut:
            log(WARNING, "%s: %s clients cut numbers to it", key, summed.cut)
        if summed.rounding > COARSE:
            coarse = "%s: rounding is up to %.0f %% of the update at secure.bits = %s"
            log(WARNING, coarse, key, 100 * summed.rounding, self.terms.bits)
        self._take_in(summed)
        self.report.participants, self.report.train_loss = survivors, summed.loss
        self._released = self.arrays()
        return self._released, MetricRecord({} if summed.loss is None else {TRAIN_LOSS: summed.loss})

    def _unshown(self, partitions: list[int], server_round: int) -> list[ClientSpec]:
        """The clients; raises `RunFailed` where their sum would show what too few of them train."""
        assert self.state is not None
        clients = [self.client_spec(partition) for partition in partitions]
        least, signed = self.terms.min_clients, None if self.peers is None else self.acting
        if why := seen_alone(self.rule, self.state, clients, least, signed):
            raise RunFailed(f"round {server_round}: {why}")
        return clients

    def _take_in(self, summed: wire.Summed) -> None:
        sent, clients = self.transport.requests[0].broadcast, self.collector.survivors
        update, self.report.sketch_lost = self._rows.update(summed, sent, clients)
        self.state, measured = self._next_state({}, [update])
        self.report.diagnostics = None if measured is None else replace(measured, cosine=None)

    # --- the exchanges --------------------------------------------------------------------------------

    def _agree(self, named: str, nodes: Mapping[int, int]) -> list[int]:
        """Exchange keys and shares with the clients; returns those that did both."""
        session = f"{named}, {secrets.token_hex(16)}"
        collector = self.collector = Collector(terms=self.terms, session=session)
        self._nodes, self._silent, signatures = dict(nodes), {}, dict[int, bytes]()

        def take_keys(partition: int, step: Step) -> None:
            keys = step.binary("keys")
            self._check(signatures, partition, step, PUBLIC, partition, keys)
            collector.take_keys(partition, keys)

        self._ask({p: {"phase": ADVERTISE, "session": session} for p in sorted(nodes)}, take_keys)
        collector.close_keys()
        there = sorted(collector.keys)
        everybody = {
            "phase": SHARE, "session": session, "partitions": there,
            "keys": [collector.keys[p] for p in there], **self._passed_on(signatures, there),
        }  # fmt: skip
        self._ask(
            dict.fromkeys(there, everybody),
            lambda partition, step: collector.take_shares(
                partition, step.table("holders", "sealed"), step.binary("digest")
            ),
        )
        collector.close_shares()
        return sorted(collector.sealed)

    def _unmask(self, survivors: list[int]) -> None:
        """Have the clients in the sum take its masks off; where they sign, all of them the same sum."""
        order: dict[str, Any] = {"session": self.collector.session, "survivors": survivors}
        if self.peers is not None:
            agreed, signatures = self.collector.agreed(), dict[int, bytes]()
            question = {"phase": CONFIRM, **order}
            self._ask(
                dict.fromkeys(survivors, question),
                lambda partition, step: self._check(signatures, partition, step, SURVIVORS, *agreed),
                lost=False,
            )
            signers = sorted(signatures)
            order |= {"signers": signers, **self._passed_on(signatures, signers)}
        order["phase"] = UNMASK
        self._ask(
            dict.fromkeys(survivors, order),
            lambda partition, step: self.collector.take_unmasking(
                partition, step.table("own-of", "own"), step.table("pair-of", "pair")
            ),
            lost=False,
        )

    def _check(
        self, signatures: dict[int, bytes], partition: int, step: Step, what: str, *parts: bytes | int
    ) -> None:
        """Keep a node's signature, so that no wrong one makes the others refuse the round."""
        if self.peers is not None:
            if "signature" not in step.record:
                raise SecureRefused("it signs nothing: secure-peers in its node.toml is empty")
            signature = step.binary("signature")
            self.peers.check(partition, signature, to_sign(what, self.collector.session, *parts))
            signatures[partition] = signature

    def _passed_on(self, signatures: Mapping[int, bytes], there: list[int]) -> dict[str, Any]:
        return {} if self.peers is None else {"signatures": [signatures[p] for p in there]}

    def _ask(self, orders: Steps, take: Callable[[int, Step], None], *, lost: bool = True) -> None:
        """One exchange; whoever does not answer, or not as it should, takes no part in what follows.

        Args:
            orders: what each is asked.
            take: takes an answer in, in partition order.
            lost: without its answer a client is not in the round's sum.
        """
        assert self._grid is not None
        records: dict[int, ConfigRecord] = {}
        messages = []
        for partition, order in orders.items():
            record = records.setdefault(id(order), ConfigRecord(dict(order)))
            content = RecordDict({SECURE: record})
            self.report.bytes_down += wire.step_bytes(content)
            group = str(self.report.server_round)
            messages.append(Message(content, self._nodes[partition], STEP, group_id=group))
        by_node = {node: partition for partition, node in self._nodes.items()}
        answers = {by_node.get(reply.metadata.src_node_id): reply
                   for reply in self._grid.send_and_receive(messages, timeout=self.timeout)}  # fmt: skip
        for partition in orders:
            self._silent[partition] = partition not in answers
            try:
                take(partition, self._answer(answers.get(partition)))
            except SecureRefused as error:
                reason = f"secure sums, {orders[partition]['phase']}: {error}"
                if lost:
                    self.report.refuse({partition: reason})
                else:
                    log(WARNING, "\tpartition %s: %s", partition, reason)

    def _answer(self, reply: Message | None) -> Step:
        if reply is None or reply.has_error():
            raise SecureRefused("no answer" if reply is None else f"failed ({reply.error.reason})")
        self.report.bytes_up += wire.step_bytes(reply.content)
        return step_of(reply.content.config_records)

    # --- from replies to one update ---------------------------------------------------------------------

    def _take_update(self, request: PendingRequest, content: RecordDict | None) -> None:
        """Add a masked update to the sum, or count its client out."""
        reply = request.reply
        try:
            if reply is None or content is None:
                raise UpdateRefused(request.failure)
            if reply.status != wire.OK:
                raise UpdateRefused(reply.reason or f"answered {reply.status!r}")
            row = wire.masked_row(content, self._length, self.terms.bits)
            self.collector.take_masked(request.partition_id, row)
        except UpdateRefused as error:
            self.report.refuse({request.partition_id: str(error)})
            return
        self.report.note(request.partition_id, reply)
        self.transport.note_ledger(request)

    def _read(self, total: Unsigned, start: Tensors) -> wire.Summed:
        """The mean; with shared noise over all that were asked: an update that does not come is zero."""
        clients = len(self.collector.sealed)
        if self.shared_noise is not None:
            return wire.from_noisy_row(total, start, self.shared_noise(clients), self._planned)
        fixed = FixedPoint(clients, self.terms.bits, self.largest_change, self.max_weight)
        return wire.from_row(total, start, fixed)
