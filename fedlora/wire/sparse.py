"""Codecs that leave most of a change for later by error feedback: its largest entries, a segment in turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.factors import Tensors
from fedlora.errors import UpdateRefused
from fedlora.wire.steps import GROUP, SCALE, ByTensor, changed, checked, named, restored, rounded

LEVELS = 127
"""Steps on either side of zero of the numbers that do travel, in 8 bits."""
BLOCK, KEPT = 256, 16
"""Numbers among which a place takes one byte, and how many of them travel."""
PLACE = "/place"
"""Ends the name of the places of what travels of a tensor."""
SEGMENTS = 4
"""Parts of a tensor that travel in turn."""
SEGMENT = "/segment"
"""Ends the name of the number of the part that travels."""


@dataclass(frozen=True, slots=True)
class TopK(ByTensor):
    """The 16 largest of every 256 entries of the change, in 8 bits each, with a byte for the place.

    In each block of 256 numbers c of a tensor, in the order of memory, the 16 largest |c_j| travel, by
    stochastic rounding as in `fedlora.wire.steps`; a tensor of fewer than 256 numbers travels whole. What is
    left out of a block is at most 15/16 of its square; of four blocks 64 numbers travel, which share a scale,
    so that

        |c - C(c)|^2 <= (1 - 16 / 256 + 64 / 127^2) |c|^2 < 0.942 |c|^2

    which is the contraction that error feedback needs (arXiv 1809.07599, 1901.09847).
    """

    name: str = "topk"
    error: float = 1.0
    unbiased: bool = False
    of_change: bool = True
    feedback: bool = True

    def nbytes(self, numbers: int) -> int:
        whole = numbers < BLOCK
        sent = numbers if whole else KEPT * -(-numbers // BLOCK)
        return sent + (0 if whole else sent) + 4 * -(-sent // GROUP)

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator, turn: int) -> Tensors:
        arrays: Tensors = {}
        for name in sorted(trained):
            change = trained[name].detach().double() - start[name].double()
            if change.numel() >= BLOCK:
                blocks = _blocks(change)
                places = blocks.abs().topk(KEPT, dim=1).indices.sort(dim=1).values
                arrays[name + PLACE] = places.to(torch.uint8)
                change = blocks.gather(1, places)
            steps, arrays[name + SCALE] = rounded(change, LEVELS, generator)
            arrays[name] = steps.reshape(change.shape)
        return arrays

    def decode(self, start: Tensors, arrays: Tensors) -> Tensors:
        trained: Tensors = {}
        for name, before in named(start, arrays, SCALE, PLACE):
            whole = before.numel() < BLOCK
            shape = before.shape if whole else (-(-before.numel() // BLOCK), KEPT)
            change = restored(name, checked(name, arrays[name], torch.int8, shape), arrays, LEVELS)
            if not whole:
                places = checked(f"{name}{PLACE}", arrays.get(name + PLACE), torch.uint8, shape).long()
                if (places[:, 1:] <= places[:, :-1]).any():
                    raise UpdateRefused(f"{name}: its places do not rise")
                blocks = change.new_zeros(shape[0], BLOCK).scatter_(1, places, change.reshape(shape))
                change = blocks.reshape(-1)[: before.numel()]
            trained[name] = changed(before, change)
        return trained


@dataclass(frozen=True, slots=True)
class Segments(ByTensor):
    """A quarter of the change, another one each time, in 8 bits.

    After EcoLoRA (arXiv 2506.02001, read in its abstract), whose clients upload one segment of the adapter
    each, in turn, so that those of a round complement each other. Here a segment is the s-th quarter of every
    tensor, in the order of memory, s the turn modulo 4, and by error feedback it holds all changes since it
    travelled last. The paper's sparsification and lossless coding are not here.
    """

    name: str = "segments"
    error: float = 1.0
    unbiased: bool = False
    of_change: bool = True
    feedback: bool = True

    def nbytes(self, numbers: int) -> int:
        sent = -(-numbers // SEGMENTS)
        return sent + 4 * -(-sent // GROUP) + 1

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator, turn: int) -> Tensors:
        arrays: Tensors = {}
        for name in sorted(trained):
            change = (trained[name].detach().double() - start[name].double()).reshape(-1)
            part = change[_segment(turn % SEGMENTS, change.numel())]
            if not torch.isfinite(change).all():
                part = torch.full_like(part, torch.nan)
            arrays[name], arrays[name + SCALE] = rounded(part, LEVELS, generator)
            arrays[name + SEGMENT] = torch.tensor([turn % SEGMENTS], dtype=torch.uint8)
        return arrays

    def decode(self, start: Tensors, arrays: Tensors) -> Tensors:
        trained: Tensors = {}
        for name, before in named(start, arrays, SCALE, SEGMENT):
            number = int(checked(f"{name}{SEGMENT}", arrays.get(name + SEGMENT), torch.uint8, (1,)))
            if number >= SEGMENTS:
                raise UpdateRefused(f"{name}: its segment is {number}, there are 0 to {SEGMENTS - 1}")
            change = torch.zeros(before.numel(), dtype=torch.float64)
            place = _segment(number, before.numel())
            steps = checked(name, arrays[name], torch.int8, tuple(change[place].shape))
            change[place] = restored(name, steps, arrays, LEVELS)
            trained[name] = changed(before, change)
        return trained


def _blocks(change: Tensor) -> Tensor:
    """The entries in rows of `BLOCK`, zeros at the end."""
    flat = change.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)


def _segment(number: int, numbers: int) -> slice:
    """Where that segment of so many numbers lies: all are of one length, but for the last."""
    length = -(-numbers // SEGMENTS)
    return slice(min(number * length, numbers), min((number + 1) * length, numbers))
