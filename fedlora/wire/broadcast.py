"""The parts of a broadcast that travel apart, so that a client that holds one need not be sent it again."""

from __future__ import annotations

from fedlora.core.adapters import tensor_names
from fedlora.core.base_patches import digest
from fedlora.core.factors import AT_REST, FACTORS, Tensors
from fedlora.core.peft_keys import from_peft, key_of, of_names, to_peft
from fedlora.core.state import Broadcast
from fedlora.wire.instruction import TrainInstruction


def frozen_tensors(broadcast: Broadcast) -> Tensors:
    """The factors that no client sends back: not trained, or personal. A client may hold them already."""
    if broadcast.fresh_seed is not None or _by_layer(broadcast):
        return {}
    moving = broadcast.trained & broadcast.uploaded
    return to_peft(broadcast.adapters, {}, tensor_names(broadcast.adapters) - moving)


def moving_tensors(broadcast: Broadcast) -> Tensors:
    """The factors that are trained and sent back. A client holds them only if they rested before."""
    if broadcast.fresh_seed is not None or _by_layer(broadcast):
        return {}
    return to_peft(broadcast.adapters, {}, broadcast.trained & broadcast.uploaded)


def layer_parts(broadcast: Broadcast) -> list[tuple[Tensors, bool]]:
    """Factors layer by layer where layers or directions rest; and whether they do.

    Those that move are apart, and so are the directions at rest. What nobody has trained since a client was
    sent it need not be sent again.
    """
    if broadcast.fresh_seed is not None or not _by_layer(broadcast):
        return []
    moving, everything = broadcast.trained & broadcast.uploaded, tensor_names(broadcast.adapters)
    parts = [
        (to_peft(broadcast.adapters, {}, names, [module]), rests or module in broadcast.resting)
        for module in broadcast.adapters
        for names, rests in ((moving, False), (everything - moving - AT_REST, True), (AT_REST, True))
    ]
    return [(tensors, rests) for tensors, rests in parts if tensors]


def _by_layer(broadcast: Broadcast) -> bool:
    """Whether a layer, or a direction of one, is at rest."""
    return bool(broadcast.resting) or not AT_REST.isdisjoint(tensor_names(broadcast.adapters))


def head_tensors(broadcast: Broadcast) -> Tensors:
    """The other trained tensors, which travel every round."""
    return to_peft({}, broadcast.head)


def frozen_part(instruction: TrainInstruction) -> Tensors:
    """Tensors of `frozen_tensors`, if they travelled; empty if the client is expected to hold them."""
    return of_names(
        instruction.arrays, (instruction.tensors or FACTORS) - (instruction.trained & instruction.uploaded)
    )


def moving_part(instruction: TrainInstruction) -> Tensors:
    """Tensors of `moving_tensors`, if they travelled; empty if the client is expected to hold them."""
    return of_names(instruction.arrays, instruction.trained & instruction.uploaded)


def layers_travelled(instruction: TrainInstruction) -> dict[str, Tensors]:
    """The parts of `layer_parts` that travelled, by digest."""
    moving, parts = instruction.trained & instruction.uploaded, dict[tuple[str, bool, bool], Tensors]()
    for module, tensors in from_peft(instruction.arrays, instruction.tensors).layers.items():
        for name, tensor in tensors.items():
            part = module, name in moving, name in AT_REST
            parts.setdefault(part, {})[key_of(module, name)] = tensor
    return {digest(part): part for part in parts.values()}
