"""Codec of an adapter of which few directions have changed: these alone, as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.factors import Tensors
from fedlora.errors import UpdateRefused
from fedlora.wire.steps import ByTensor, checked, kind_of, named

AXES = {".lora_A.weight": 0, ".lora_B.weight": 1}
"""Ends of the names of tensors that have directions, and the axis along these."""
PLACE = "/direction"
"""Ends the name of the numbers of the directions that travel."""
MOST = 256
"""Directions that a byte tells apart."""


@dataclass(frozen=True, slots=True)
class Changed(ByTensor):
    """The rows of A and columns of B that changed, in float32, with a byte for the place of each.

    Nothing is lost. Tensors all of which changed travel whole, as do those that have no directions.
    """

    name: str = "changed"
    error: float = 0.0
    unbiased: bool = True
    of_change: bool = False
    feedback: bool = False

    def nbytes(self, numbers: int) -> int:
        return 4 * numbers

    def most_bytes(self, tensors: Tensors, choose: int, steps: int) -> int:
        whole = sum(self.nbytes(tensor.numel()) for tensor in tensors.values())
        return min(whole, chosen_bytes(tensors, choose)) if choose else whole

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator, turn: int) -> Tensors:
        arrays: Tensors = {}
        for name, tensor in trained.items():
            arrays[name] = whole = tensor.detach().to("cpu", torch.float32)
            axis = _axis(name, whole)
            if axis is None:
                continue
            places = (whole != start[name]).any(dim=1 - axis).nonzero().reshape(-1)
            if len(places) < whole.shape[axis]:
                arrays[name] = whole.index_select(axis, places)
                arrays[name + PLACE] = places.to(torch.uint8)
        return arrays

    def decode(self, start: Tensors, arrays: Tensors) -> Tensors:
        trained: Tensors = {}
        for name, before in named(start, arrays, PLACE):
            given, places = arrays[name], arrays.get(name + PLACE)
            if not given.is_floating_point():
                raise UpdateRefused(f"array {name} is {kind_of(given)}, upload = {self.name!r} sends floats")
            axis = _axis(name, before)
            if places is not None:
                given = _put_back(name, before, given, places, axis)
            trained[name] = given.to(torch.float32)
        return trained


def chosen_bytes(tensors: Tensors, count: int) -> int:
    """Bytes of so many directions of tensors, the largest of all, and of the tensors that have none."""
    directions, others = list[int](), 0
    for name, tensor in tensors.items():
        axis = _axis(name, tensor)
        if axis is None:
            others += 4 * tensor.numel()
        else:
            directions += [4 * tensor.shape[1 - axis] + 1] * tensor.shape[axis]
    return others + sum(sorted(directions, reverse=True)[:count])


def _axis(name: str, tensor: Tensor) -> int | None:
    """The axis of a tensor along its directions; None where it has none, or more than a byte tells apart."""
    axis = next((axis for ending, axis in AXES.items() if name.endswith(ending)), None)
    return axis if axis is not None and tensor.ndim == 2 and tensor.shape[axis] <= MOST else None


def _put_back(name: str, before: Tensor, given: Tensor, places: Tensor, axis: int | None) -> Tensor:
    """What a tensor is now, of which some directions came."""
    if axis is None:
        raise UpdateRefused(f"{name}: some of its directions came, it has none")
    count = places.numel()
    found = checked(f"{name}{PLACE}", places, torch.uint8, (count,)).long()
    if (found[1:] <= found[:-1]).any() or (found >= before.shape[axis]).any():
        raise UpdateRefused(f"{name}: its directions do not rise, or are not below {before.shape[axis]}")
    shape = [*before.shape]
    shape[axis] = count
    part = checked(name, given, torch.float32, tuple(shape))
    return before.to(torch.float32).index_copy(axis, found, part)
