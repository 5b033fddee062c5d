"""Upload codecs: how a client's trained tensors are written down for the way to the server.

An instruction names its codec and a seed; both sides hold the tensors that training began from, so that a
codec may write down the change alone. What comes back is checked and aggregated as if it had been sent whole.
A client that is not fedlora's and knows no codec sends floats, which are always understood.

Digests are of downloads and know nothing of this. Under differential privacy the noise is in the tensors
already, and what a codec makes of them is post-processing: it costs nothing and weakens nothing.

A codec is unbiased, or it has *error feedback* (Karimireddy et al., arXiv 1901.09847), or its error is a
rounding of the number: with feedback, what was left out of a change stays at the client and is added to what
it trains the next time. With d_t the change that was trained and C what arrives of a change,

    c_t = d_t + e_t,    sent is C(c_t),    e_{t+1} = c_t - C(c_t),    sum_t C(c_t) = sum_t d_t - e_{T+1}

so that nothing is lost, only late. Which rules that suits says `strategies.uploads`.

A codec is one class here or beside, and an entry of `CODECS`; `tests/wire/test_upload.py` holds it to what it
declares. Both sides must know it, so that none is loaded by name from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedlora.core.factors import Tensors
from fedlora.errors import UpdateRefused, unknown_name
from fedlora.wire.changed import Changed
from fedlora.wire.seeds import MOST_MOVES, Seeds
from fedlora.wire.sparse import Segments, TopK
from fedlora.wire.steps import ByTensor, Steps, kind_of


class UploadCodec(Protocol):
    """Writes down what was trained, by name of the tensor.

    Attributes:
        name: the value of ``upload``.
        feedback: what it leaves out is kept at the client and told later, see the module.
        unbiased: the mean of what is decoded, over seeds, is what was trained.
        error: by how much an entry may be off, as a share of the largest entry of its tensor.
        of_change: that largest entry is one of the tensor's change, not of the tensor itself.
        of_steps: it tells local steps, which the client hands it as `Reply.written`, and no other change.
    """

    @property
    def name(self) -> str: ...
    @property
    def feedback(self) -> bool: ...
    @property
    def unbiased(self) -> bool: ...
    @property
    def error(self) -> float: ...
    @property
    def of_change(self) -> bool: ...
    @property
    def of_steps(self) -> bool: ...

    def most_bytes(self, tensors: Tensors, choose: int, steps: int) -> int:
        """Bytes of what was trained as it travels; where they differ from turn to turn, the most.

        Args:
            tensors: of the names and shapes of what is trained.
            choose: as in `Broadcast`.
            steps: of the client's round.
        """

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator, turn: int) -> Tensors:
        """Arrays that travel.

        Args:
            start: what training began from, of the names and shapes of ``trained``; float32.
            trained: what is to be told, float32.
            generator: of the client and round; nothing else is drawn from.
            turn: rounds count it up, and neighbouring clients differ by one.
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
class Cast(ByTensor):
    """Numbers themselves, rounded to a type of float; ``start`` does not matter."""

    name: str
    width: int
    error: float
    unbiased: bool
    of_change: bool = False
    feedback: bool = False

    def nbytes(self, numbers: int) -> int:
        return numbers * self.width // 8

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator, turn: int) -> Tensors:
        kind: torch.dtype = getattr(torch, self.name)
        return {name: tensor.detach().to("cpu", kind) for name, tensor in trained.items()}

    def decode(self, start: Tensors, arrays: Tensors) -> Tensors:
        for name, tensor in arrays.items():
            if not tensor.is_floating_point():
                raise UpdateRefused(f"array {name} is {kind_of(tensor)}, upload = {self.name!r} sends floats")
        return {name: tensor.to(torch.float32) for name, tensor in arrays.items()}


CODECS: dict[str, UploadCodec] = {
    codec.name: codec
    for codec in (
        Cast("float32", width=32, error=0.0, unbiased=True),
        Cast("float16", width=16, error=2.0**-11, unbiased=False),
        Steps("int8", width=8),
        Steps("int4", width=4),
        TopK(),
        Segments(),
        Changed(),
        Seeds(),
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


def most_bytes(upload: str, tensors: Tensors, choose: int = 0, steps: int = MOST_MOVES) -> int:
    """`UploadCodec.most_bytes` of the codec of that name; by default of all directions and most steps."""
    return codec_named(upload).most_bytes(tensors, choose, steps)


def with_owed(trained: Tensors, owed: Mapping[str, Tensor]) -> Tensors:
    """What was trained and what is owed from before, where that is of the same shape."""
    return {
        name: tensor + owed[name] if name in owed and owed[name].shape == tensor.shape else tensor
        for name, tensor in trained.items()
    }
