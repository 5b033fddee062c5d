"""From a reply to an update that may be aggregated, or the one-line reason why not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging import WARNING

import torch
from flwr.common.logger import log
from torch import Tensor

from fedlora import wire
from fedlora.core.adapters import as_lora, tensor_names
from fedlora.core.directions import count_changed
from fedlora.core.factors import PLAIN, LoraFactors, Tensors, resize
from fedlora.core.peft_keys import peft_name
from fedlora.core.state import Broadcast, ClientUpdate
from fedlora.errors import UpdateRefused
from fedlora.wire import Reply
from strategies import client_side
from strategies.facts import Facts
from strategies.request import PendingRequest

NUM_EXAMPLES = "num-examples"
LARGEST = 1e6
"""Magnitude beyond which nothing is averaged: products of two smaller numbers are far from overflow, and a
mean with a larger one would be of no use to anybody who goes on from it."""
MOST_WEIGHT = 2.0**53
"""A count that a float holds exactly; sums of such weights, and of numbers weighted by them, are finite."""
KnownExamples = Callable[[int], int | None]
"""Partition id -> the most examples that it can have, as far as the server knows."""


def validate_reply(
    request: PendingRequest,
    facts: Facts,
    *,
    weighted_by_key: str | None,
    max_update_norm: float = 0.0,
    known_examples: KnownExamples = lambda partition: None,
) -> ClientUpdate:
    """The update in a request's reply; factors that were not shipped are as they were broadcast.

    Args:
        request: the instruction and its reply.
        facts: of the rule, for what a client that is not fedlora's must do.
        weighted_by_key: metric that weighs the clients; None weighs them equally.
        max_update_norm: the furthest that all tensors together may have moved; 0 means any distance.
        known_examples: what nobody can claim more examples than, where examples weigh.

    Raises:
        UpdateRefused: no usable reply, one of another round, another shape, rank or module, a NaN, a
            number beyond `LARGEST`, a frozen factor that came back changed, a base that was not acknowledged,
            too long a way from the start, more directions than a client may choose, or no weight, or one of
            more examples than there are.
    """
    reply = request.reply
    if reply is None:
        raise UpdateRefused(request.failure)
    if reply.status != wire.OK:
        raise UpdateRefused(reply.reason or f"answered {reply.status!r} (lacks {len(reply.missing)} parts)")
    shipped = wire.from_peft(_decoded(request, reply), tensor_names(request.broadcast.adapters))
    plain = not (reply.answers or reply.holds)
    if plain and facts.updates_base:
        raise UpdateRefused(client_side.needs_base_mod(facts))
    if plain and not facts.trained <= PLAIN and not shipped.of("R"):
        raise UpdateRefused(client_side.needs_core(facts))
    unacknowledged = set(request.needs.base) - set(reply.holds)
    if unacknowledged:
        raise UpdateRefused(
            f"does not acknowledge {len(unacknowledged)} base patches, which {facts.title} moved the base by"
        )
    half = reply.half and not request.half
    starts = {module: adapter.tensors() for module, adapter in request.broadcast.adapters.items()}
    checked = {
        module: {
            name: _tensor(module, name, start, shipped, facts=facts, broadcast=request.broadcast, half=half)
            for name, start in tensors.items()
        }
        for module, tensors in starts.items()
    }
    adapters = {m: start.replaced(checked[m]) for m, start in request.broadcast.adapters.items()}
    _refuse_foreign(starts, shipped)
    if request.rank:
        adapters = {name: resize(as_lora(f), request.rank, f.scaling) for name, f in adapters.items()}
    update = ClientUpdate(
        partition_id=request.partition_id,
        adapters=adapters,
        head=_head(request.broadcast.head, shipped.head),
        weight=checked_weight(reply.metrics, weighted_by_key),
    )
    _check_choice(update, request, reply)
    known = known_examples(request.partition_id) if weighted_by_key == NUM_EXAMPLES else None
    if known is not None and update.weight > known:
        raise UpdateRefused(f"claims {update.weight:g} examples, it is known to have {known}")
    if max_update_norm > 0:
        _check_distance(update, request.broadcast, max_update_norm)
    return update


def _decoded(request: PendingRequest, reply: Reply) -> Tensors:
    """Tensors of a reply as float32, whatever codec wrote them."""
    if not reply.codec:
        return reply.arrays
    if reply.codec != request.upload:
        raise UpdateRefused(f"its arrays are written as {reply.codec!r}, asked for was {request.upload!r}")
    sent = request.broadcast
    start = wire.to_peft(sent.adapters, sent.head, sent.uploaded, sent.modules)
    return wire.CODECS[reply.codec].decode(start, reply.arrays)


def evaluated(request: PendingRequest, weighted_by_key: str | None) -> dict[str, float]:
    """The metrics in a request's reply to an instruction to evaluate.

    Raises:
        UpdateRefused: no usable reply, or no weight.
    """
    reply = request.reply
    if reply is None or reply.status != wire.OK:
        raise UpdateRefused(
            request.failure if reply is None else reply.reason or f"answered {reply.status!r}"
        )
    checked_weight(reply.metrics, weighted_by_key)
    return reply.metrics


def _check_choice(update: ClientUpdate, request: PendingRequest, reply: Reply) -> None:
    """Refuse changes of more directions than were to be chosen, where the codec leaves the others alone."""
    codec, most = wire.CODECS[reply.codec or "float32"], request.broadcast.choose
    if not most or reply.half or not (codec.of_change or codec.error == 0):
        return
    if (found := count_changed(request.broadcast.adapters, update.adapters)) > most:
        raise UpdateRefused(client_side.needs_choice(found, most))


def _check_distance(update: ClientUpdate, start: Broadcast, most: float) -> None:
    """Refuse ``||update - start||_2 > most`` over factors and head together."""
    moves = [update.head[name] - tensor for name, tensor in start.head.items()]
    for name, begun in start.adapters.items():
        ended = update.adapters[name]
        if isinstance(begun, LoraFactors) and begun.rank != ended.rank:  # a model keeps its rank
            begun = resize(begun, ended.rank, ended.scaling)
        moves += [ended.tensors()[letter] - tensor for letter, tensor in begun.tensors().items()]
    distance = math.sqrt(sum(float(move.double().square().sum()) for move in moves))
    if distance > most:
        raise UpdateRefused(f"moved by {distance:.3g}, strategy.max-update-norm = {most:g}")


def evaluations(
    requests: Sequence[PendingRequest], weighted_by_key: str | None
) -> Iterator[tuple[PendingRequest, dict[str, float]]]:
    """The requests to evaluate that were answered, with their metrics; the others are logged."""
    for request in requests:
        try:
            yield request, evaluated(request, weighted_by_key)
        except UpdateRefused as error:
            log(WARNING, "\tpartition %s does not evaluate: %s", request.partition_id, error)


def _tensor(
    module: str, name: str, start: Tensor, shipped: wire.PeftTensors, *, facts: Facts, broadcast: Broadcast,
    half: bool,
) -> Tensor:  # fmt: skip
    """One tensor of a layer: what came back, or as it was sent."""
    given = shipped.layers.get(module, {})
    expected = name in broadcast.uploaded and module in broadcast.modules
    if name not in given:
        if expected:
            raise UpdateRefused(f"{module}: {peft_name(name)} is missing")
        return start
    tensor = given[name]
    if fault := _fault(tensor, start):
        raise UpdateRefused(f"{module}: {peft_name(name)} {fault}")
    if expected:
        return tensor
    if half and (name in broadcast.adapters[module].part(facts.trained) or facts.rotates_basis):
        raise UpdateRefused(client_side.needs_precision(facts, peft_name(name), "float16"))
    if not torch.equal(tensor, start):
        raise UpdateRefused(f"{module}: {_why_changed(name, module, tensor, start, facts, broadcast)}")
    return start


def _why_changed(
    name: str, module: str, tensor: Tensor, start: Tensor, facts: Facts, broadcast: Broadcast
) -> str:
    """Explanation for a client that sent another value for a tensor which it should not send."""
    spelled = peft_name(name)
    if name in broadcast.trained and module in broadcast.modules:
        return client_side.needs_own_mod(facts, spelled)
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(tensor, start.to(dtype).to(start.dtype)):
            return client_side.needs_precision(facts, spelled, str(dtype).removeprefix("torch."))
    return client_side.needs_freezing(facts, spelled)


def _head(start: Tensors, shipped: Tensors) -> Tensors:
    unknown = sorted(set(shipped) - set(start))
    if unknown:
        raise UpdateRefused(
            f"unknown tensor {unknown[0]}; expected are {', '.join(sorted(start)) or 'no others'}"
        )
    for name, expected in start.items():
        if name not in shipped:
            raise UpdateRefused(f"{name} is missing")
        if fault := _fault(shipped[name], expected):
            raise UpdateRefused(f"{name} {fault}")
    return shipped


def _fault(tensor: Tensor, expected: Tensor) -> str:
    """Fault of a tensor that came back, to follow its name; empty if there is none."""
    if tensor.shape != expected.shape:
        return f"has shape {tuple(tensor.shape)}, expected {tuple(expected.shape)}"
    if not torch.isfinite(tensor).all():
        return "holds a NaN or an infinity"
    too_large = bool((tensor.abs() > LARGEST).any())
    return f"holds numbers beyond {LARGEST:g}, which are not averaged" if too_large else ""


def _refuse_foreign(starts: Mapping[str, Tensors], shipped: wire.PeftTensors) -> None:
    foreign = sorted(set(shipped.layers) - set(starts))
    if foreign:
        raise UpdateRefused(f"unknown module {foreign[0]} ({len(starts)} modules are adapted)")
    for module, given in sorted(shipped.layers.items()):
        for name in sorted(given.keys() - starts[module].keys()):
            why = "the adapter has no core" if name == "R" else "the adapter has no such tensor"
            raise UpdateRefused(f"{module}: {peft_name(name)} came back, but {why}")


def checked_weight(metrics: dict[str, float], key: str | None) -> float:
    """The weight of a client; 1 for everybody without a key.

    Raises:
        UpdateRefused: the metric is not there, is no single number, or is none from 0 to 2^53.
    """
    if key is None:
        return 1.0
    weight = metrics.get(key)
    if weight is None or not 0 <= weight <= MOST_WEIGHT:
        raise UpdateRefused(f"metric {key!r} = {weight}: must be there, one number, from 0 to 2^53")
    return weight
