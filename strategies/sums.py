"""What clients add up in a round whose sums alone are known, and the one update that stands for all of them.

Of most rules of sums they add up what they ship, and the update is its mean. A rule that needs the mean
product (`Facts.sketched`) gets that as one client's factors, out of sketches of products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora import wire
from fedlora.core.adapters import Adapters, lora_set, tensor_names
from fedlora.core.factors import AdapterSet, Tensors
from fedlora.core.seeding import derive
from fedlora.core.sketch import SPARE, Sketch
from fedlora.core.state import Broadcast, ClientSpec, ClientUpdate, State
from fedlora.secure.participant import common_start
from fedlora.secure.step import SKETCH, START, STARTS, Step
from strategies.rule import Rule, trained_modules
from strategies.transport import Transport


@dataclass(frozen=True, slots=True)
class Shipped:
    """Clients add up what they ship; all of them were sent the same."""

    @property
    def asked(self) -> dict[str, Any]:
        """What clients are told of it."""
        return {}

    def start(self, sent: Broadcast) -> Tensors:
        """The tensors of which changes are added up."""
        return wire.to_peft(sent.adapters, sent.head, sent.uploaded, sent.modules)

    def update(
        self, summed: wire.Summed, sent: Broadcast, clients: Iterable[int]
    ) -> tuple[ClientUpdate, float | None]:
        """The update, and which share of the mean products' norm is not in it, where that is measured.

        Args:
            summed: the mean.
            sent: what one client started from.
            clients: that are in it.
        """
        parts = wire.from_peft(summed.tensors, tensor_names(sent.adapters))
        return _update(summed, parts.over(sent.adapters), parts.head), None


@dataclass(frozen=True, slots=True)
class Sketched(Shipped):
    """Clients add up sketches of products, whatever they were sent.

    Attributes:
        sketch: of all layers.
        layers: the global adapter where the round trains it.
        ranks: partition -> its rank.
    """

    sketch: Sketch
    layers: AdapterSet
    ranks: dict[int, int] = field(default_factory=dict)

    @property
    def asked(self) -> dict[str, Any]:
        return {SKETCH: self.sketch.size, "sketch-seed": self.sketch.seed, "layers": list(self.layers)}

    def start(self, sent: Broadcast) -> Tensors:
        return sent.head | self.sketch.start(self.layers)

    def update(
        self, summed: wire.Summed, sent: Broadcast, clients: Iterable[int]
    ) -> tuple[ClientUpdate, float]:
        most = sum(self.ranks[partition] for partition in clients)
        means, lost = self.sketch.products(self.layers, summed.tensors, most)
        head = {name: summed.tensors[name] for name in sent.head}
        return _update(summed, {**sent.adapters, **means}, head), lost


def rows_of(rule: Rule, state: State, clients: Sequence[ClientSpec], size: int) -> Shipped:
    """What the clients of the next round add up.

    Args:
        rule: with what it allocates.
        state: before the round.
        clients: that may be in the sum.
        size: of sketches; 0: as many columns as the clients' ranks sum to, and a few to spare.
    """
    if not rule.facts.sketched:
        return Shipped()
    allocated, ranks = rule.allocation.modules(state), {c.partition_id: c.rank for c in clients}
    layers = lora_set({name: adapter for name, adapter in state.adapters.items() if name in allocated})
    seed = derive(state.seed, SKETCH, state.round + 1)
    return Sketched(Sketch(size or sum(ranks.values()) + SPARE, seed), layers, ranks)


def seen_alone(
    rule: Rule, state: State, clients: Sequence[ClientSpec], least: int,
    acting: Callable[[int], str] | None = None,
) -> str:  # fmt: skip
    """Why a sum would show what fewer clients than it may be of train; empty if it would not.

    Nodes that sign (``acting``, see `tell_starts`) take part only where as many start as they do: else a
    server could send all others what leaves them where they are. A sum of products shows more: the server
    knows the A that clients start from, and it moves little, so that it can tell B's columns apart, and takes
    those that it knows off. A layer that few train, and a rank that few have, are theirs.
    """
    if acting is not None:
        asked = Counter((c.rank, c.scaling, c.modules, acting(c.partition_id)) for c in clients)
        if len(asked) > 1 and (few := min(asked.values())) < least:
            return (
                f"lora.ranks, client-groups: {few} clients are asked for something else than the others; "
                f"where nodes sign it takes secure.min-clients = {least}"
            )
    if not rule.facts.sketched:
        return ""
    kinds = Counter((c.rank, trained_modules(state, c)) for c in clients)
    for (rank, layers), own in kinds.items():
        beside = sum(n for (r, others), n in kinds.items() if r >= rank and others >= layers)
        if beside < least:
            return (
                f"lora.ranks, client-groups: {beside} clients have rank {rank} in all layers of {own} of "
                f"them, so that a sum shows theirs; needed are secure.min-clients = {least}"
            )
    return ""


def tell_starts(transport: Transport, settings: Mapping[str, Any], acting: Callable[[int], str]) -> bytes:
    """Tell each client the digest of what it starts from, and where they are unlike those of all.

    Args:
        transport: with all instructions of a round, and what travels beside them.
        settings: of the round.
        acting: what of the run's configuration acts on a partition's update.

    Returns:
        What follows from all of them, see `fedlora.secure.participant.common_start`.
    """
    starts = {}
    for request in transport.requests:
        partition, values = request.partition_id, transport.encodings.digest(request.payload.tensors)
        told, row = transport.settings(request, settings), Step(transport.beside[partition])
        starts[partition] = wire.start_digest(values, told, acting(partition), row)
    for partition, record in transport.beside.items():
        record[START] = starts[partition]
        if len(set(starts.values())) > 1:
            record[STARTS] = list(starts.values())
    return common_start(starts)


def told_by_sums(rule: Rule) -> bool:
    """Whether sums tell the mean product, so that an aggregation can be measured but for clients' cosine.

    Of an exact rule that is a mean it is the product of the mean; of factors that are both averaged it is in
    no sum of theirs.
    """
    return rule.facts.exact or rule.facts.sketched


def _update(summed: wire.Summed, adapters: Adapters, head: Tensors) -> ClientUpdate:
    return ClientUpdate(partition_id=0, adapters=adapters, head=head, weight=float(summed.weight))
