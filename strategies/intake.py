"""From a reply to an update that may be aggregated, or the one-line reason why not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedlora import wire
from fedlora.errors import UpdateRefused
from fedlora.factors import AdapterSet, LoraFactors, Tensors
from fedlora.updates import Broadcast, ClientUpdate
from strategies.courier import Parcel

NUM_EXAMPLES = "num-examples"


def accept(parcel: Parcel, *, weighted_by_key: str | None, max_update_norm: float = 0.0) -> ClientUpdate:
    """The update in a parcel's reply; factors that were not shipped are as they were broadcast.

    Args:
        parcel: the order and its reply.
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
    unacknowledged = set(parcel.needs.base) - set(reply.holds)
    if unacknowledged:
        raise UpdateRefused(
            f"does not acknowledge {len(unacknowledged)} base patches; "
            "a rule that moves the base needs fedlora's ClientApp or its base mod"
        )
    shipped = wire.from_peft(reply.arrays)
    adapters = {
        name: LoraFactors(
            A=_factor("A", name, start.A, shipped.A, parcel.broadcast),
            B=_factor("B", name, start.B, shipped.B, parcel.broadcast),
            scaling=start.scaling,
            R=None if start.R is None else _factor("R", name, start.R, shipped.R, parcel.broadcast),
        )
        for name, start in parcel.broadcast.adapters.items()
    }
    _refuse_foreign(parcel.broadcast.adapters, shipped)
    update = ClientUpdate(
        partition_id=parcel.partition_id,
        adapters=adapters,
        head=_head(parcel.broadcast.head, shipped.head),
        weight=_weight(reply.metrics, weighted_by_key),
    )
    if max_update_norm > 0:
        _check_distance(update, parcel.broadcast, max_update_norm)
    return update


def _check_distance(update: ClientUpdate, start: Broadcast, most: float) -> None:
    """Refuse ``||update - start||_2 > most`` over factors and head together."""
    moves = [update.head[name] - tensor for name, tensor in start.head.items()]
    for name, factors in start.adapters.items():
        ends = update.adapters[name].tensors()
        moves += [ends[letter] - tensor for letter, tensor in factors.tensors().items()]
    distance = math.sqrt(sum(float(move.double().square().sum()) for move in moves))
    if distance > most:
        raise UpdateRefused(f"moved by {distance:.3g}, strategy.max-update-norm = {most:g}")


def _factor(factor: str, module: str, start: Tensor, shipped: Tensors, broadcast: Broadcast) -> Tensor:
    expected = factor in broadcast.ships and module in broadcast.modules
    if module not in shipped:
        if expected:
            raise UpdateRefused(f"{module}: lora_{factor} is missing")
        return start
    tensor = shipped[module]
    _check(f"{module}: lora_{factor}", tensor, start)
    if not expected:
        if not torch.equal(tensor, start):
            raise UpdateRefused(f"{module}: lora_{factor} came back changed, but it is not trained here")
        return start
    return tensor


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


def _weight(metrics: dict[str, float], key: str | None) -> float:
    if key is None:
        return 1.0
    weight = metrics.get(key)
    if weight is None or not math.isfinite(weight) or weight < 0:
        raise UpdateRefused(f"metric {key!r} = {weight}: must be there, finite and >= 0")
    return weight
