"""Half precision on the wire: what travels is first rounded to float16, at its source.

Digests name the values that a client decodes, and every client must start from the same bits. So the
server rounds what it keeps and sends, and then no cast on the way loses anything. Rounding to float16 moves
a number by at most 2^-11 of itself (below 6e-5 by at most 3e-8); a number above 65,504 becomes infinite, and
an update that holds one is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedlora.core.adapters import Adapters, lora_set
from fedlora.core.base_patches import Patch, folded
from fedlora.core.factors import Tensors, resize
from fedlora.core.state import Broadcast, State


def rounded_state(state: State, dtype: torch.dtype) -> State:
    """The state with all that a client may be sent rounded; the rule's own memory stays as it is."""
    if dtype == torch.float32:
        return replace(state, base=folded(state.base))
    return replace(
        state,
        adapters=_adapters(state.adapters, dtype),
        head=_tensors(state.head, dtype),
        base=folded([_patch(patch, dtype) for patch in state.base]),
    )


def rounded_broadcast(broadcast: Broadcast, dtype: torch.dtype) -> Broadcast:
    """The broadcast, rounded; factors that a client draws for itself do not travel and stay."""
    if dtype == torch.float32:
        return broadcast
    fresh = broadcast.fresh_seed is not None
    adapters = broadcast.adapters if fresh else _adapters(broadcast.adapters, dtype)
    return replace(broadcast, adapters=adapters, head=_tensors(broadcast.head, dtype))


def padded(broadcast: Broadcast, rank: int) -> Broadcast:
    """The broadcast with adapters of this rank, zeros beyond their own, where no gradient ever moves them.

    For models that keep the rank which they were built with, like PEFT's.
    """
    adapters = {name: resize(f, rank, f.scaling) for name, f in lora_set(broadcast.adapters).items()}
    return replace(broadcast, adapters=adapters)


def _patch(patch: Patch, dtype: torch.dtype) -> Patch:
    """The same object where nothing changes, so that its digest is computed once.

    A sum of many patches stays as it is: rounded, it would swallow the next ones.
    """
    tensors = patch.tensors()
    rounded = _tensors(tensors, dtype)
    same = bool(patch.sum_of) or all(torch.equal(tensor, rounded[name]) for name, tensor in tensors.items())
    return patch if same else Patch.from_tensors(rounded)


def _adapters(adapters: Adapters, dtype: torch.dtype) -> Adapters:
    return {name: adapter.replaced(_tensors(adapter.tensors(), dtype)) for name, adapter in adapters.items()}


def _tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype).to(torch.float32) for name, tensor in tensors.items()}
