"""Stochastic rounding by groups: numbers as whole steps of a scale that 64 of them share.

For each group of numbers d, in the order of memory, with u uniform in [0, 1), L steps on either side of zero:

    h = max |d| / L,    q = floor(d / h + u) in {-L, .., L},    d' = h q,    E[d'] = d

So do means of what clients send, and products of factors that are rounded apart. Entries that are not finite
spoil the scale of their group, which is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.factors import Tensors
from fedlora.errors import UpdateRefused

GROUP = 64
"""Numbers that share a scale."""
SCALE = "/scale"
"""Ends the name of a tensor's scales; no parameter's name holds a slash."""


class ByTensor:
    """Codec whose bytes follow from how many numbers each tensor has."""

    __slots__ = ()
    of_steps = False

    def nbytes(self, numbers: int) -> int:
        """Bytes of a tensor of so many numbers, at most."""
        raise NotImplementedError

    def most_bytes(self, tensors: Tensors, choose: int, steps: int) -> int:
        return sum(self.nbytes(tensor.numel()) for tensor in tensors.values())


@dataclass(frozen=True, slots=True)
class Steps(ByTensor):
    """The change in ``width`` bits by stochastic rounding: 127 steps on either side of zero in 8, 7 in 4.

    A number takes its bits and its 64th of a float32. Steps of 4 bits travel in pairs, the first in the low
    half of a byte, each with 7 added to it.
    """

    name: str
    width: int
    unbiased: bool = True
    of_change: bool = True
    feedback: bool = False

    @property
    def levels(self) -> int:
        return int(2 ** (self.width - 1) - 1)

    @property
    def error(self) -> float:
        return 1 / self.levels

    def nbytes(self, numbers: int) -> int:
        return -(-numbers * self.width // 8) + 4 * -(-numbers // GROUP)

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator, turn: int) -> Tensors:
        arrays: Tensors = {}
        for name in sorted(trained):
            change = trained[name].detach().double() - start[name].double()
            steps, arrays[name + SCALE] = rounded(change, self.levels, generator)
            arrays[name] = steps.reshape(change.shape) if self.width == 8 else _paired(steps + self.levels)
        return arrays

    def decode(self, start: Tensors, arrays: Tensors) -> Tensors:
        trained: Tensors = {}
        for name, before in named(start, arrays, SCALE):
            if self.width == 8:
                steps = checked(name, arrays[name], torch.int8, before.shape)
            else:
                pairs = checked(name, arrays[name], torch.uint8, (-(-before.numel() // 2),))
                steps = _parted(pairs)[: before.numel()].to(torch.int8) - self.levels
            trained[name] = changed(before, restored(name, steps, arrays, self.levels))
        return trained


def rounded(change: Tensor, levels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Steps of a change, (n,) int8, and the scales of its groups, (ceil(n / GROUP),) float32."""
    groups = _grouped(change)
    scales = groups.abs().amax(dim=1).div(levels).float()
    scales = torch.nextafter(scales, scales.new_tensor(math.inf)).where(scales > 0, scales)
    usable = torch.isfinite(scales) & (scales > 0)
    steps = torch.where(usable[:, None], groups / scales[:, None].double(), 0.0)
    drawn = torch.rand(groups.shape, generator=generator, dtype=torch.float64)
    return torch.floor(steps + drawn).to(torch.int8).reshape(-1)[: change.numel()], scales


def restored(name: str, steps: Tensor, arrays: Tensors, levels: int) -> Tensor:
    """What the steps of a tensor tell, (n,) float64.

    Raises:
        UpdateRefused: the scales among the arrays do not belong to them, or a step is out of range.
    """
    scales, count = arrays.get(name + SCALE), -(-steps.numel() // GROUP)
    if scales is None or scales.dtype != torch.float32 or scales.shape != (count,):
        given = "missing" if scales is None else f"{kind_of(scales)} {tuple(scales.shape)}"
        raise UpdateRefused(f"{name}: its scales are {given}, expected float32 {(count,)}")
    if not (torch.isfinite(scales).all() and (scales >= 0).all()):
        raise UpdateRefused(f"{name}: a scale is negative, a NaN or an infinity")
    if (steps < -levels).any():
        raise UpdateRefused(f"{name}: a step is below -{levels}")
    if (steps > levels).any():
        raise UpdateRefused(f"{name}: a step is above {levels}")
    return (_grouped(steps.double()) * scales[:, None].double()).reshape(-1)[: steps.numel()]


def changed(before: Tensor, change: Tensor) -> Tensor:
    """A tensor and its change, in any shape of as many numbers, float32."""
    return (before.double() + change.reshape(before.shape)).float()


def named(start: Tensors, arrays: Tensors, *endings: str) -> list[tuple[str, Tensor]]:
    """The tensors that arrays tell of, each with what it began from; ``endings`` name what belongs to one.

    Raises:
        UpdateRefused: an array of no tensor that there is.
    """
    found = []
    for name in arrays:
        if any(name.endswith(ending) and name.removesuffix(ending) in arrays for ending in endings):
            continue
        if name not in start:
            raise UpdateRefused(f"unknown tensor {name}; expected are {', '.join(sorted(start))}")
        found.append((name, start[name]))
    return found


def checked(name: str, array: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The array, which must be of that type and shape.

    Raises:
        UpdateRefused: it is not.
    """
    if array is None or array.dtype != dtype or array.shape != shape:
        given = "missing" if array is None else f"{kind_of(array)} {tuple(array.shape)}"
        expected = f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
        raise UpdateRefused(f"{name} is {given}, expected {expected}")
    return array


def kind_of(tensor: Tensor) -> str:
    """The name of a tensor's type, for messages."""
    return str(tensor.dtype).removeprefix("torch.")


def _grouped(tensor: Tensor) -> Tensor:
    """The entries in rows of `GROUP`, zeros at the end: (ceil(n / GROUP), GROUP)."""
    flat = tensor.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).reshape(-1, GROUP)


def _paired(halves: Tensor) -> Tensor:
    """Numbers of 4 bits, two to a byte: (ceil(n / 2),) uint8."""
    pairs = torch.nn.functional.pad(halves, (0, halves.numel() % 2)).to(torch.uint8).reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _parted(pairs: Tensor) -> Tensor:
    """The numbers of `_paired`, (2 n,)."""
    return torch.stack([pairs & 15, pairs >> 4], dim=1).reshape(-1)
