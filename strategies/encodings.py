"""Encodings of a round's tensors, each made once however many clients are sent them."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedlora import wire
from fedlora.core.base_patches import digest
from fedlora.core.factors import Tensors


class Encodings:
    """Records and digests by the tensors themselves, which it keeps, so that no address is another's.

    Args:
        wire_dtype: in which floats travel.
        packed: a record is one array.
    """

    def __init__(self, wire_dtype: str, *, packed: bool) -> None:
        self._wire_dtype, self._packed = wire_dtype, packed
        self._records: dict[tuple[int, ...], tuple[Tensors, ArrayRecord]] = {}
        self._digests: dict[tuple[int, ...], tuple[Tensors, str]] = {}

    def record(self, tensors: Tensors) -> ArrayRecord:
        """One record for tensors of the same bits, so that an engine can ship it once."""
        key = tuple(id(t) for t in tensors.values())
        if key not in self._records:
            twins = (record for known, record in self._records.values() if _alike(known, tensors))
            record = next(twins, None)
            self._records[key] = (
                tensors,
                wire.to_record(tensors, self._wire_dtype, packed=self._packed) if record is None else record,
            )
        return self._records[key][1]

    def digest(self, tensors: Tensors) -> str:
        """The digest of tensors, taken once for tensors that are the same objects; empty for none."""
        key = tuple(id(t) for t in tensors.values())
        if key and key not in self._digests:
            self._digests[key] = (tensors, digest(tensors))
        return self._digests[key][1] if key else ""


def _alike(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(_same_bits(t, other[name]) for name, t in one.items())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)
