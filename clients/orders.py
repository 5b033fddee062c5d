"""Opening an order: store what travelled, look up what is held, and complete the starting adapter.

No model is touched here, so that any ClientApp can use it (see `clients.mod`).
"""

from __future__ import annotations

from dataclasses import dataclass

from clients.holdings import Holdings
from fedlora import wire
from fedlora.errors import UpdateRefused
from fedlora.factors import AdapterSet, Tensors
from fedlora.updates import Patch


@dataclass(frozen=True, slots=True)
class Opened:
    """An order whose parts are all here.

    Attributes:
        adapters: the complete starting adapter, all factors of every module.
        head: the other tensors that travelled.
        holdings: the store; the base patches are in it under ``order.needs.base``.
    """

    adapters: AdapterSet
    head: Tensors
    holdings: Holdings

    def with_own(self, own: Tensors) -> Opened:
        """The same with tensors that the client kept to itself, in PEFT's spelling, in their place."""
        mine = wire.from_peft(own)
        return Opened(mine.over(self.adapters), {**self.head, **mine.head}, self.holdings)

    def patch(self, name: str) -> Patch:
        """The base patch of a digest.

        Raises:
            UpdateRefused: it is no longer in the store.
        """
        tensors = self.holdings.get(name)
        if tensors is None:
            raise UpdateRefused(f"base patch {name[:12]} vanished from the store")
        return Patch.from_tensors(tensors)


def open_order(order: wire.TrainOrder, holdings: Holdings) -> Opened | wire.Reply:
    """The opened order, or the reply that lists what this client lacks.

    Raises:
        UpdateRefused: a part does not have the content that its digest promises.
    """
    try:
        for name, tensors in order.parts.items():
            holdings.keep(name, tensors)
        for name, tensors in _named_parts(order):
            if tensors:
                holdings.keep(name, tensors)
    except ValueError as error:
        raise UpdateRefused(str(error)) from None
    missing = tuple(name for name in order.needs.digests if not holdings.has(name))
    if missing:
        return wire.Reply(status=wire.MISSING, missing=missing)
    held = Tensors()
    for name, _ in _named_parts(order):
        held |= holdings.get(name) or {}
    adapters, head = wire.complete_adapters(order, held)
    return Opened(adapters, head, holdings)


def _named_parts(order: wire.TrainOrder) -> list[tuple[str, Tensors]]:
    """The digests of factors that the order names, each with what travelled of it (nothing, or all)."""
    parts = [(order.needs.frozen, wire.frozen_part(order)), (order.needs.moving, wire.moving_part(order))]
    return [(name, tensors) for name, tensors in parts if name]
