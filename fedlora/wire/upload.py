"""Upload codecs: how a client's trained tensors are written down for the way to the server.

An instruction names its codec and a seed; both sides hold the tensors that training began from, so that a
codec may write down the change alone. What comes back is checked and aggregated as if it had been sent whole.
A client that is not fedlora's and knows no codec sends floats, which are always understood.

Digests are of downloads and know nothing of this. Under differential privacy the noise is in the tensors
already, and what a codec makes of them is post-processing: it costs nothing and weakens nothing.

A codec is one class below and an entry of `CODECS`; `tests/wire/test_upload.py` holds it to what it declares.
Both sides must know it, so that none is loaded by name from elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedlora.core.factors import Tensors
from fedlora.errors import UpdateRefused, unknown_name


class UploadCodec(Protocol):
    """Writes down what was trained, by name of the tensor.

    Attributes:
        name: the value of ``upload``.
        bits: that a number takes in a large tensor.
        unbiased: the mean of what is decoded, over seeds, is what was trained.
        error: by how much an entry may be off, as a share of the largest entry of its tensor.
        of_change: that largest entry is one of the tensor's change, not of the tensor itself.
    """

    @property
    def name(self) -> str: ...
    @property
    def bits(self) -> float: ...
    @property
    def unbiased(self) -> bool: ...
    @property
    def error(self) -> float: ...
    @property
    def of_change(self) -> bool: ...

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator) -> Tensors:
        """Arrays that travel.

        Args:
            start: what training began from, of the names and shapes of ``trained``; float32.
            trained: what is to be told, float32.
            generator: of the client and round; nothing else is drawn from.
        """

    def decode(self, start: Tensors, arrays: Tensors) -> Tensors:
        """Decoded tensors, float32, as nearly as the codec tells them.

        Args:
            start: what training began from; at least all that may come back.
            arrays: what came, of any names, shapes and dtypes that can travel.

        Raises:
            UpdateRefused: it is nothing that `encode` makes.
        """


@dataclass(frozen=True, slots=True)
class Cast:
    """Numbers themselves, rounded to a type of float; ``start`` does not matter."""

    name: str
    bits: float
    error: float
    unbiased: bool
    of_change: bool = False

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator) -> Tensors:
        kind: torch.dtype = getattr(torch, self.name)
        return {name: tensor.detach().to("cpu", kind) for name, tensor in trained.items()}

    def decode(self, start: Tensors, arrays: Tensors) -> Tensors:
        for name, tensor in arrays.items():
            if not tensor.is_floating_point():
                raise UpdateRefused(f"array {name} is {_kind(tensor)}, upload = {self.name!r} sends floats")
        return {name: tensor.to(torch.float32) for name, tensor in arrays.items()}


GROUP = 64
"""Numbers that share a scale."""
LEVELS = 127
"""Steps on either side of zero."""
SCALE = "/scale"
"""Ends the name of a tensor's scales; no parameter's name holds a slash."""


@dataclass(frozen=True, slots=True)
class Int8:
    """The change in 8 bits by stochastic rounding, 64 numbers to a scale.

    For each group of a tensor's change d, in the order of memory, with u uniform in [0, 1):

        h = max |d| / 127,    q = floor(d / h + u) in {-127, .., 127},    d' = h q,    E[d'] = d

    So do means of what clients send, and products of factors that are rounded apart. A number takes 8 bits
    and its 64th of a float32. Entries that are not finite spoil the scale of their group, which is refused.
    """

    name: str = "int8"
    bits: float = 8 + 32 / GROUP
    error: float = 1 / LEVELS
    unbiased: bool = True
    of_change: bool = True

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator) -> Tensors:
        arrays: Tensors = {}
        for name in sorted(trained):
            change = trained[name].detach().double() - start[name].double()
            groups = _grouped(change)
            scales = groups.abs().amax(dim=1).div(LEVELS).float()
            scales = torch.nextafter(scales, scales.new_tensor(math.inf)).where(scales > 0, scales)
            usable = torch.isfinite(scales) & (scales > 0)
            steps = torch.where(usable[:, None], groups / scales[:, None].double(), 0.0)
            drawn = torch.rand(groups.shape, generator=generator, dtype=torch.float64)
            rounded = torch.floor(steps + drawn).to(torch.int8).reshape(-1)[: change.numel()]
            arrays[name] = rounded.reshape(change.shape)
            arrays[name + SCALE] = scales
        return arrays

    def decode(self, start: Tensors, arrays: Tensors) -> Tensors:
        trained: Tensors = {}
        for name, steps in arrays.items():
            if name.endswith(SCALE) and name.removesuffix(SCALE) in arrays:
                continue
            if name not in start:
                raise UpdateRefused(f"unknown tensor {name}; expected are {', '.join(sorted(start))}")
            before, scales = start[name], arrays.get(name + SCALE)
            if steps.dtype != torch.int8 or steps.shape != before.shape:
                shape = f"{_kind(steps)} {tuple(steps.shape)}"
                raise UpdateRefused(f"{name} is {shape}, expected int8 {tuple(before.shape)}")
            count = -(-steps.numel() // GROUP)
            if scales is None or scales.dtype != torch.float32 or scales.shape != (count,):
                given = "missing" if scales is None else f"{_kind(scales)} {tuple(scales.shape)}"
                raise UpdateRefused(f"{name}: its scales are {given}, expected float32 {(count,)}")
            if not (torch.isfinite(scales).all() and (scales >= 0).all()):
                raise UpdateRefused(f"{name}: a scale is negative, a NaN or an infinity")
            if (steps < -LEVELS).any():
                raise UpdateRefused(f"{name}: a step is below -{LEVELS}")
            change = (_grouped(steps.double()) * scales[:, None].double()).reshape(-1)[: steps.numel()]
            trained[name] = (before.double() + change.reshape(before.shape)).float()
        return trained


CODECS: dict[str, UploadCodec] = {
    codec.name: codec
    for codec in (
        Cast("float32", bits=32, error=0.0, unbiased=True),
        Cast("float16", bits=16, error=2.0**-11, unbiased=False),
        Int8(),
    )
}
"""By the value of ``upload``."""


def codec_named(name: str) -> UploadCodec:
    """The codec of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CODECS:
        raise unknown_name("upload", name, CODECS)
    return CODECS[name]


def _grouped(tensor: Tensor) -> Tensor:
    """The entries in rows of `GROUP`, zeros at the end: (ceil(n / GROUP), GROUP)."""
    flat = tensor.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).reshape(-1, GROUP)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
