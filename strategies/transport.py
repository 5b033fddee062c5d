"""Delta-encodes broadcasts against what each client has acknowledged, once for each distinct broadcast.

The transport remembers, for each partition, the digests of base patches and factors that it has
acknowledged. It leaves those out, counts the bytes of what does travel, and serves a client that
answers ``missing`` (it sat out, lost its reply, or lost its disk) in the same round. So a factor that
rested at a client in one round (RoLoRA) need not travel when it is trained in the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedlora import wire
from fedlora.core.base_patches import Patch
from fedlora.core.factors import Tensors
from fedlora.core.seeding import derive
from fedlora.core.state import Broadcast
from fedlora.errors import ConfigError
from fedlora.secure.step import SECURE
from strategies.encodings import Encodings
from strategies.request import Payload, PendingRequest, read_reply, says_missing

Send = Callable[..., Iterable[Message]]
"""The replies to messages within ``timeout`` seconds, as `flwr.serverapp.Grid.send_and_receive`."""
Acknowledged = dict[int, set[str]]
"""Partition id -> digests that it has acknowledged."""


class Transport:
    """Encodes instructions and reads replies; what it knows of clients is part of a snapshot.

    Args:
        init_a: how clients draw a fresh A.
        wire_dtype: ``float32``, or ``float16`` for broadcasts that are rounded to it.
        upload: codec of the replies, see `fedlora.wire.upload`; empty for that of ``wire_dtype``.
        seed: root of what codecs draw.
        packed: each record travels as one array, which only fedlora's own clients read.
        arrayrecord_key, configrecord_key: names of the records in the instructions.

    Attributes:
        acknowledged: see `Acknowledged`.
        ledger_heads: partition id -> the head of its privacy ledger when it last said: a client sees by it
            that its ledger was not set back since.
        requests: of this round.
        encodings: of its tensors.
        beside: partition id -> what travels with its orders, see `fedlora.wire.secure`.
        row_bytes: of a masked update, where the round has those.

    Raises:
        ConfigError: names of records that are not different, or no such codec.
    """

    def __init__(
        self,
        init_a: str,
        wire_dtype: str = "float32",
        *,
        upload: str = "",
        seed: int = 0,
        packed: bool = False,
        arrayrecord_key: str = wire.ARRAYS,
        configrecord_key: str = wire.CONFIG,
    ) -> None:
        if len({arrayrecord_key, configrecord_key, wire.PARTS}) < 3:
            raise ConfigError(
                f"arrayrecord_key = {arrayrecord_key!r}, configrecord_key = {configrecord_key!r}: must "
                f"be two names, neither of them {wire.PARTS!r}"
            )
        self.init_a, self.wire_dtype, self.upload, self.seed = init_a, wire_dtype, upload or wire_dtype, seed
        wire.codec_named(self.upload)
        self.arrayrecord_key, self.configrecord_key = arrayrecord_key, configrecord_key
        self._places: dict[str, int] = {}
        self.beside: dict[int, ConfigRecord] = {}
        self.row_bytes = 0
        self.packed = packed
        self.acknowledged: Acknowledged = {}
        self.ledger_heads: dict[int, str] = {}
        self.requests: list[PendingRequest] = []
        self._by_node: dict[int, PendingRequest] = {}
        self._patches: dict[str, Patch] = {}
        self._base: tuple[str, ...] = ()
        self._payloads: dict[tuple[Any, ...], Payload] = {}
        self.encodings = Encodings(wire_dtype, packed=packed)
        self._parts: dict[tuple[str, ...], ArrayRecord] = {}
        self._expected: dict[tuple[Any, ...], int] = {}

    def arrange(self, names: Iterable[str]) -> None:
        """Arrays travel in this order of their names, which Flower's clipping mods compare."""
        self._places = {name: place for place, name in enumerate(names)}

    def arranged(self, tensors: Tensors) -> Tensors:
        """The same tensors, in the order of `arrange`."""
        last = len(self._places)
        return {name: tensors[name] for name in sorted(tensors, key=lambda n: self._places.get(n, last))}

    def open(self, base: tuple[Patch, ...], pending: Sequence[PendingRequest] = ()) -> None:
        """Begin a round of instructions over this base; the last round's are forgotten, but for these."""
        self._payloads, self._parts, self._expected = {}, {}, {}
        self.encodings = Encodings(self.wire_dtype, packed=self.packed)
        self.requests, self._by_node = [*pending], {request.node_id: request for request in pending}
        late = {name for request in pending for name in request.needs.base}  # folded since, perhaps
        self._patches = {name: patch for name, patch in self._patches.items() if name in late}
        self._patches |= {patch.digest(): patch for patch in base}
        self._base = tuple(patch.digest() for patch in base)

    def add(self, partition_id: int, node_id: int, broadcast: Broadcast, rank: int = 0) -> PendingRequest:
        """Another client's instruction, with all it must hold for it; ``rank`` as in `PendingRequest`."""
        payload, digest = self._payload(broadcast), self.encodings.digest
        frozen = digest(payload.frozen)
        others = self.acknowledged.get(partition_id, set()) - {*self._patches, frozen}
        moving = digest(payload.moving) if others else ""  # without others, nothing to be hashed for
        layers = [(digest(part), rests) for part, rests in payload.layers]
        needs = wire.Needs(
            base=self._base,
            frozen=frozen,
            moving=moving if moving in others else "",
            layers=tuple(name for name, rests in layers if rests or name in others),
            sum_of=self._held_terms(self.acknowledged.get(partition_id, set())),
        )
        half = self.wire_dtype == "float16"
        request = PendingRequest(partition_id, node_id, broadcast, payload, needs, rank, half, self.upload)
        self.requests.append(request)
        self._by_node[node_id] = request
        return request

    def messages(self, message_type: str, config: Mapping[str, Any]) -> list[Message]:
        """The messages of all instructions; see `message`."""
        return [self.message(request, message_type, config) for request in self.requests]

    def exchange(
        self, send: Send, messages: Sequence[Message], message_type: str, config: Mapping[str, Any],
        timeout: float,
    ) -> list[Message]:  # fmt: skip
        """Send the instructions; clients that lack a part are served once more within ``timeout`` seconds."""
        if not messages:
            return []
        deadline = time.monotonic() + timeout
        replies = list(send(messages, timeout=timeout))
        again = self.fuller(replies, message_type, config)
        if again:
            left = max(1.0, deadline - time.monotonic())
            replies = [reply for reply in replies if not says_missing(reply)]
            replies += send(again, timeout=left)
        return replies

    def fuller(
        self, replies: Iterable[Message], message_type: str, config: Mapping[str, Any]
    ) -> list[Message]:
        """Orders again, with the parts that their clients answered that they lack."""
        again = []
        for reply in [*filter(says_missing, replies)]:
            request = self._request_of(reply)
            if request is None:
                continue
            request.bytes_up += wire.payload_bytes(reply.content)
            lacks = wire.decode_reply(reply.content).missing
            self._forget(request, lacks)
            again.append(self.message(request, message_type, config))
        return again

    def settle(self, replies: Iterable[Message], *, trained: bool = True) -> dict[int, RecordDict]:
        """Put each reply into its request and note what its client holds now.

        Args:
            replies: to the instructions of this round.
            trained: they answer instructions to train, so that they must hold arrays.

        Returns:
            Partition id -> content of its reply, in the order of partitions.
        """
        contents = {}
        for message in replies:
            request = self._request_of(message)
            reply = None if request is None else read_reply(request, message, trained=trained)
            if request is None or reply is None:
                continue
            contents[request.partition_id] = message.content
            if reply.status == wire.OK:
                self.acknowledged[request.partition_id] = set(reply.holds) & set(request.needs.digests)
            elif reply.status == wire.MISSING:  # a loop that serves nobody twice: next round
                self._forget(request, reply.missing)
        return dict(sorted(contents.items()))

    def expected_bytes(self, node_id: int) -> int:
        """Payload bytes of a node's reply to its instruction of now, before there is one.

        They are the most of all rounds where a codec sends other parts by turns.
        """
        if self.row_bytes:
            return self.row_bytes
        request = self._by_node[node_id]
        broadcast = request.broadcast
        key = id(request.payload), broadcast.modules, broadcast.choose
        if key not in self._expected:
            sent = wire.to_peft(broadcast.adapters, broadcast.head, broadcast.uploaded, broadcast.modules)
            self._expected[key] = wire.most_bytes(self.upload, sent, broadcast.choose)
        return self._expected[key]

    def note_ledger(self, request: PendingRequest) -> None:
        """Remember the head of its privacy ledger that a client has just said."""
        privacy = None if request.reply is None else request.reply.privacy
        if privacy is not None:
            self.ledger_heads[request.partition_id] = str(privacy.get("ledger_head", ""))

    def _request_of(self, reply: Message) -> PendingRequest | None:
        node = reply.metadata.src_node_id
        if node in self._by_node:
            return self._by_node[node]
        asked = reply.metadata.reply_to_message_id
        return next((p for p in self.requests if asked and asked in p.message_ids()), None)

    def message(self, request: PendingRequest, message_type: str, config: Mapping[str, Any]) -> Message:
        """The message of an instruction; ``config`` holds at least ``server-round``.

        Raises:
            ConfigError: a name in ``config`` that the instruction's own settings have.
        """
        if taken := sorted(wire.INSTRUCTION_KEYS & config.keys()):
            raise ConfigError(f"{message_type}_config {taken[0]!r}: the strategy's own setting, rename yours")
        content = self._content(request, config)
        request.identity = wire.identity(config)
        request.bytes_down += wire.payload_bytes(content) + wire.step_bytes(content)
        message = Message(content, request.node_id, message_type, group_id=str(config["server-round"]))
        request.sent.append(message)
        return message

    def settings(self, request: PendingRequest, config: Mapping[str, Any]) -> dict[str, Any]:
        """All settings of an instruction."""
        head = self.ledger_heads.get(request.partition_id, "")
        own = wire.instruction_config(request.broadcast, request.needs, self.init_a)
        if self.upload != "float32":
            who = config["server-round"], request.partition_id
            seed = derive(self.seed, "upload", *who)
            own |= {"upload": self.upload, "upload-seed": seed, "upload-turn": sum(who)}
        return {
            **config,
            **({"ledger-head": head} if head else {}),
            **{key: value for key, value in own.items() if value != []},
        }

    def _content(self, request: PendingRequest, config: Mapping[str, Any]) -> RecordDict:
        held, payload = self.acknowledged.get(request.partition_id, set()), request.payload
        travels = {} if request.needs.moving in held else dict(payload.moving)
        travels |= payload.head
        if request.needs.frozen not in held:
            travels |= payload.frozen
        for part, _ in payload.layers:
            if self.encodings.digest(part) not in held:
                travels |= part
        settings = self.settings(request, config)
        arrays = self.encodings.record(self.arranged(travels))
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: ConfigRecord(settings)})
        terms = request.needs.sum_of
        added_up = request.needs.base[:1] if terms and held.issuperset(terms) else ()
        lacks = tuple(name for name in request.needs.base if name not in held and name not in added_up)
        if lacks:
            content[wire.PARTS] = self._part(lacks)
        if request.partition_id in self.beside:
            content[SECURE] = self.beside[request.partition_id]
        return content

    def _forget(self, request: PendingRequest, lacks: Iterable[str]) -> None:
        """Note that a client lacks parts; who lacks a sum came to other bits by its terms, and is sent it."""
        lacking = {*lacks}
        if {*request.needs.base[:1]} & lacking:
            lacking |= {*request.needs.sum_of}
        self.acknowledged.setdefault(request.partition_id, set()).difference_update(lacking)

    def _held_terms(self, held: set[str]) -> tuple[str, ...]:
        """What the first base patch is the sum of, if a client holds that and not the sum."""
        first = self._patches[self._base[0]].sum_of if self._base else ()
        return first if first and self._base[0] not in held and held.issuperset(first) else ()

    def _payload(self, broadcast: Broadcast) -> Payload:
        values = (*broadcast.adapters.values(), *broadcast.head.values())
        what = broadcast.trained, broadcast.uploaded, broadcast.resting, broadcast.fresh_seed
        key = (*what, *map(id, values))
        if key not in self._payloads:
            self._payloads[key] = Payload(
                broadcast,
                wire.moving_tensors(broadcast),
                wire.frozen_tensors(broadcast),
                wire.layer_parts(broadcast),
                wire.head_tensors(broadcast),
            )
        return self._payloads[key]

    def _part(self, names: tuple[str, ...]) -> ArrayRecord:
        if names not in self._parts:
            patches = {name: self._patches[name] for name in names}
            self._parts[names] = wire.parts_record(patches, self.wire_dtype, packed=self.packed)
        return self._parts[names]
