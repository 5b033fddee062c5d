"""Secure sums as Flower's records: an update as one row of integers under masks, and what a step weighs.

    [ w change_1, .., w change_n, w loss | w, w where the loss is told, 1 where a number was cut ]

Changes are of the tensors that are shipped, in the order of their names; the last three are counts and exact.
Where a rule needs the mean product, sketches of products are in place of factors, as changes from zero.
Where clients share noise, a row is of changes alone, everybody's once and with noise: nothing of it is exact.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedlora.core.factors import Tensors
from fedlora.errors import SecureRefused
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.masks import Unsigned, packed, unpacked
from fedlora.secure.noise import SharedNoise, Words
from fedlora.secure.step import ALIKE, MASKED, SECURE, Step, size_of
from fedlora.wire.arrays import decoded_array

COUNTS = 3
OWN_SETTINGS = frozenset(
    {"ledger-head", "needs-frozen", "needs-moving", "needs-layers", "base-sum-of"}
    | {"upload-seed", "upload-turn"}
)
"""Settings of an instruction that differ from client to client, and change nothing of what it trains."""
LARGEST_LOSS = 64.0


@dataclass(frozen=True, slots=True)
class Summed:
    """What a sum says.

    Attributes:
        tensors: start and mean change.
        weight: the sum of the clients' weights.
        loss: mean over those that told one; None where nobody did.
        cut: clients of which some number was beyond the largest change.
        rounding: standard deviation of the rounding of all changes at most, as a share of their norm.
    """

    tensors: Tensors
    weight: int
    loss: float | None
    cut: int
    rounding: float = 0.0


def row_length(start: Tensors, *, noisy: bool = False) -> int:
    """Integers in a row."""
    return sum(tensor.numel() for tensor in start.values()) + (0 if noisy else 1 + COUNTS)


def to_row(
    start: Tensors, trained: Tensors, weight: int, loss: float | None, fixed: FixedPoint,
    generator: np.random.Generator,
) -> Unsigned:  # fmt: skip
    """The row of a client, not masked.

    Args:
        start: what training began from.
        trained: the same tensors after it.
        weight: from 0 to the largest.
        loss: None where it is not told.
        fixed: how numbers are written.
        generator: rounds.

    Raises:
        SecureRefused: a change that is no number: under masks nobody else could see that.
    """
    change = _change(start, trained)
    if not np.isfinite(change).all():
        raise SecureRefused("its update holds a NaN or an infinity")
    told = loss is not None and math.isfinite(loss)
    scaled = (loss or 0.0) / LARGEST_LOSS * fixed.limit if told else 0.0
    cut = int(bool(np.abs(change).max(initial=0.0) > fixed.limit))
    counts = [fixed.count(number) for number in (weight, weight if told else 0, cut)]
    return np.concatenate([fixed.encode(np.append(change, scaled), float(weight), generator), *counts])


def from_row(total: Unsigned, start: Tensors, fixed: FixedPoint) -> Summed:
    """The mean out of a sum of rows.

    Raises:
        SecureRefused: the weights sum to zero.
    """
    weight, told, cut = fixed.counted(total[-COUNTS:])
    if not weight:
        raise SecureRefused("the weights of all clients sum to zero")
    sums = fixed.decode(total[:-COUNTS])
    loss = float(sums[-1]) / fixed.limit * LARGEST_LOSS / told if told else None
    change = sums[:-1] / weight
    spread, norm = fixed.spread(weight) * math.sqrt(len(change)), float(np.linalg.norm(change))
    return Summed(_moved(start, change), weight, loss, cut, spread / norm if norm else 0.0)


def to_noisy_row(start: Tensors, trained: Tensors, noise: SharedNoise, words: Words) -> Unsigned:
    """The row of a client that adds its share of noise, not masked; see `SharedNoise.encode`."""
    return noise.encode(_change(start, trained), words)


def from_noisy_row(total: Unsigned, start: Tensors, noise: SharedNoise, planned: int) -> Summed:
    """Start and mean over so many clients, asked whether or not they are in the sum, out of its row."""
    return Summed(_moved(start, noise.decode(total) / planned), weight=1, loss=None, cut=0)


def masked_record(row: Unsigned, bits: int) -> ArrayRecord:
    """A masked row as it travels."""
    return ArrayRecord({MASKED: Array(packed(row, bits))})


def masked_row(content: RecordDict, length: int, bits: int) -> Unsigned:
    """The masked row in a reply.

    Raises:
        SecureRefused: there is none of that length and modulus.
    """
    array = content.array_records.get(MASKED, ArrayRecord()).get(MASKED)
    row = None if array is None else decoded_array(MASKED, array)
    if row is None or row.shape != (length * bits // 8,) or row.dtype != np.uint8:
        raise SecureRefused(f"its update is not a row of {length} integers of {bits} bits under masks")
    return unpacked(row, bits)


def _change(start: Tensors, trained: Tensors) -> NDArray[np.float64]:
    flat = [(trained[name].double() - start[name].double()).numpy().reshape(-1) for name in sorted(start)]
    return np.concatenate(flat or [np.zeros(0)])


def _moved(start: Tensors, change: NDArray[np.float64]) -> Tensors:
    tensors, begin = Tensors(), 0
    for name in sorted(start):
        part = change[begin : begin + start[name].numel()]
        begin += len(part)
        moved = start[name].double() + torch.from_numpy(part).reshape(start[name].shape)
        tensors[name] = moved.to(torch.float32)
    return tensors


def start_digest(values: str, settings: Mapping[str, Any], acting: str, row: Step) -> bytes:
    """A digest of all that decides what a client's data make of a round, as it is before it trains.

    Args:
        values: digest of the adapter and head that it is sent, or holds and is told to start from.
        settings: of its instruction; those that say what it holds already are left out.
        acting: what of the configuration acts on it.
        row: how its update is to be written.
    """
    told = {key: value for key, value in settings.items() if key not in OWN_SETTINGS}
    written = {key: row.record[key] for key in ALIKE if key in row.record}
    text = json.dumps([values, told, acting, written], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()


def step_bytes(content: RecordDict) -> int:
    """Payload bytes of the step in a message; none where there is no step."""
    return size_of(content.config_records.get(SECURE, ConfigRecord()))
