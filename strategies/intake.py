"""From a reply to an update that may be aggregated, or the one-line reason why not."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from fedlora import wire
from fedlora.errors import UpdateRefused
from fedlora.factors import PLAIN, AdapterSet, LoraFactors, Tensors, resize
from fedlora.updates import Broadcast, ClientUpdate
from strategies import client_side
from strategies.courier import Parcel
from strategies.facts import Facts
from strategies.metrics import checked_weight

NUM_EXAMPLES = "num-examples"


def accept(
    parcel: Parcel, facts: Facts, *, weighted_by_key: str | None, max_update_norm: float = 0.0
) -> ClientUpdate:
    """The update in a parcel's reply; factors that were not shipped are as they were broadcast.

    Args:
        parcel: the order and its reply.
        facts: of the rule, for what a client that is not fedlora's must do.
        weighted_by_key: metric that weighs the clients; None weighs them equally.
        max_update_norm: the furthest that all tensors together may have moved; 0 means any distance.

    Raises:
        UpdateRefused: no usable reply, one of another round, another shape, rank or module, a NaN, a
            frozen factor that came back changed, a base that was not acknowledged, too long a way from
            the start, or no weight.
    """
    reply = parcel.reply
    if reply is None:
        raise UpdateRefused(parcel.failure)
    if reply.status != wire.OK:
        raise UpdateRefused(reply.reason or f"answered {reply.status!r} (lacks {len(reply.missing)} parts)")
    shipped = wire.from_peft(reply.arrays)
    plain = not (reply.answers or reply.holds)
    if plain and facts.moves_base:
        raise UpdateRefused(client_side.needs_base_mod(facts))
    if plain and not facts.trains <= PLAIN and not shipped.R:
        raise UpdateRefused(client_side.needs_core(facts))
    unacknowledged = set(parcel.needs.base) - set(reply.holds)
    if unacknowledged:
        raise UpdateRefused(
            f"does not acknowledge {len(unacknowledged)} base patches, which {facts.title} moved the base by"
        )
    factor = partial(_factor, facts=facts, broadcast=parcel.broadcast, half=reply.half and not parcel.half)
    adapters = {
        name: LoraFactors(
            A=factor("A", name, start.A, shipped.A),
            B=factor("B", name, start.B, shipped.B),
            scaling=start.scaling,
            R=None if start.R is None else factor("R", name, start.R, shipped.R),
        )
        for name, start in parcel.broadcast.adapters.items()
    }
    _refuse_foreign(parcel.broadcast.adapters, shipped)
    if parcel.rank:
        adapters = {name: resize(f, parcel.rank, f.scaling) for name, f in adapters.items()}
    update = ClientUpdate(
        partition_id=parcel.partition_id,
        adapters=adapters,
        head=_head(parcel.broadcast.head, shipped.head),
        weight=checked_weight(reply.metrics, weighted_by_key),
    )
    if max_update_norm > 0:
        _check_distance(update, parcel.broadcast, max_update_norm)
    return update


def evaluated(parcel: Parcel, weighted_by_key: str | None) -> dict[str, float]:
    """The metrics in a parcel's reply to an order to evaluate.

    Raises:
        UpdateRefused: no usable reply, or no weight.
    """
    reply = parcel.reply
    if reply is None or reply.status != wire.OK:
        raise UpdateRefused(parcel.failure if reply is None else reply.reason or f"answered {reply.status!r}")
    checked_weight(reply.metrics, weighted_by_key)
    return reply.metrics


def _check_distance(update: ClientUpdate, start: Broadcast, most: float) -> None:
    """Refuse ``||update - start||_2 > most`` over factors and head together."""
    moves = [update.head[name] - tensor for name, tensor in start.head.items()]
    for name, factors in start.adapters.items():
        ends = update.adapters[name].tensors()
        moves += [ends[letter] - tensor for letter, tensor in factors.tensors().items()]
    distance = math.sqrt(sum(float(move.double().square().sum()) for move in moves))
    if distance > most:
        raise UpdateRefused(f"moved by {distance:.3g}, strategy.max-update-norm = {most:g}")


def _factor(
    factor: str, module: str, start: Tensor, shipped: Tensors, *, facts: Facts, broadcast: Broadcast,
    half: bool,
) -> Tensor:  # fmt: skip
    expected = factor in broadcast.ships and module in broadcast.modules
    if module not in shipped:
        if expected:
            raise UpdateRefused(f"{module}: lora_{factor} is missing")
        return start
    tensor = shipped[module]
    _check(f"{module}: lora_{factor}", tensor, start)
    if expected:
        return tensor
    if half and (factor in facts.trains or facts.turns):
        raise UpdateRefused(client_side.needs_precision(facts, factor, "float16"))
    if not torch.equal(tensor, start):
        raise UpdateRefused(f"{module}: {_why_changed(factor, module, tensor, start, facts, broadcast)}")
    return start


def _why_changed(
    factor: str, module: str, tensor: Tensor, start: Tensor, facts: Facts, broadcast: Broadcast
) -> str:
    """What a client did that sent another value for a factor which it should not send."""
    if factor in broadcast.trains and module in broadcast.modules:
        return client_side.needs_own_mod(facts, factor)
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(tensor, start.to(dtype).to(start.dtype)):
            return client_side.needs_precision(facts, factor, str(dtype).removeprefix("torch."))
    return client_side.needs_freezing(facts, factor)


def _head(start: Tensors, shipped: Tensors) -> Tensors:
    unknown = sorted(set(shipped) - set(start))
    if unknown:
        raise UpdateRefused(
            f"unknown tensor {unknown[0]}; expected are {', '.join(sorted(start)) or 'no others'}"
        )
    for name, expected in start.items():
        if name not in shipped:
            raise UpdateRefused(f"{name} is missing")
        _check(name, shipped[name], expected)
    return shipped


def _check(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise UpdateRefused(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
    if not torch.isfinite(tensor).all():
        raise UpdateRefused(f"{name} holds a NaN or an infinity")


def _refuse_foreign(adapters: AdapterSet, shipped: wire.PeftTensors) -> None:
    foreign = sorted(shipped.modules - set(adapters))
    if foreign:
        raise UpdateRefused(f"unknown module {foreign[0]} ({len(adapters)} modules are adapted)")
    for name in sorted(shipped.R):
        if adapters[name].R is None:
            raise UpdateRefused(f"{name}: lora_R came back, but the adapter has no core")
