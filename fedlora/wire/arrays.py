"""Named tensors as Flower's ArrayRecords, and the bytes that they take.

In the usual form each tensor is an array of its own, under its own name, which any PEFT app reads. Flower
moves every array by requests of its own, each through TLS and a database; so between a server and clients
that are both fedlora's all tensors of a record travel as one array of bytes, in the safetensors format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedlora.core.factors import Tensors
from fedlora.errors import UpdateRefused, first_line

ARRAYS, PARTS, CONFIG, METRICS = "arrays", "parts", "config", "metrics"
"""Names of the records in a message."""
DTYPES = {"float32", "float16", "float64"}
"""Of floats that are understood wherever numbers travel."""
CODED = DTYPES | {"int8", "uint8"}
"""Of arrays that an upload codec may write."""
PACKED = "safetensors"
"""The only array of a record whose tensors travel together; no tensor has this name."""
LENGTH_BYTES = 8
"""In which a file in the safetensors format says how long its header is."""


def to_record(
    tensors: Mapping[str, Tensor], dtype: str | None = "float32", *, packed: bool = False
) -> ArrayRecord:
    """An ArrayRecord of the tensors, names kept; ``packed`` into one array.

    Args:
        tensors: by name.
        dtype: what they travel as, ``float32`` or ``float16``; None leaves each as it is.
        packed: see the module.
    """
    kind = None if dtype is None else getattr(torch, dtype)
    plain = {name: t.detach().to("cpu", kind).contiguous() for name, t in tensors.items()}
    if packed:
        return ArrayRecord({PACKED: Array(np.frombuffer(save(plain), np.uint8))})
    return ArrayRecord({name: Array(t.numpy()) for name, t in plain.items()})


def is_packed(record: ArrayRecord) -> bool:
    """Whether its tensors travel in one array."""
    return list(record) == [PACKED]


def from_record(record: ArrayRecord, *, coded: bool = False) -> Tensors:
    """The tensors of an ArrayRecord, in either form, as float32.

    Args:
        record: what arrived.
        coded: an upload codec wrote it, which reads it as it is: each tensor keeps its type.

    Raises:
        UpdateRefused: an array that is not a plain NumPy array of floats, or lies about its shape.
    """
    accepted = CODED if coded else DTYPES
    tensors = _unpacked(record[PACKED], accepted) if is_packed(record) else _single(record, accepted)
    return tensors if coded else {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def _single(record: ArrayRecord, accepted: Collection[str]) -> Tensors:
    tensors: Tensors = {}
    for name, array in record.items():
        decoded = decoded_array(name, array)
        if str(decoded.dtype) not in accepted or decoded.shape != tuple(array.shape):
            raise UpdateRefused(
                f"array {name} is {decoded.dtype} {decoded.shape}, announced as {tuple(array.shape)}; "
                f"accepted are {', '.join(sorted(accepted))}"
            )
        tensors[name] = torch.from_numpy(np.array(decoded, order="C"))
    return tensors


def _unpacked(array: Array, accepted: Collection[str]) -> Tensors:
    decoded = decoded_array(PACKED, array)
    try:
        tensors = load(decoded.astype(np.uint8, casting="no").tobytes())
    except (SafetensorError, TypeError, ValueError, KeyError) as error:
        raise UpdateRefused(f"array {PACKED} cannot be decoded: {first_line(error)}") from None
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in accepted:
            raise UpdateRefused(f"array {name} is {tensor.dtype}; accepted are {', '.join(sorted(accepted))}")
    return tensors


def decoded_array(name: str, array: Array) -> NDArray[Any]:
    """An array in NumPy's own format, pickling refused.

    Raises:
        UpdateRefused: it is none.
    """
    try:
        return np.asarray(array.numpy())
    except Exception as error:
        raise UpdateRefused(f"array {name} cannot be decoded: {first_line(error)}") from None


def read_json(text: object) -> Any:
    """Value of a text that travelled, None where it is no JSON."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def nbytes(record: ArrayRecord | None) -> int:
    """Payload bytes: the tensors' own, without names and headers; all bytes of what cannot be read."""
    if record is None:
        return 0
    packed = is_packed(record)
    return sum(_nbytes(array, packed=packed) for array in record.values())


def _nbytes(array: Array, *, packed: bool) -> int:
    try:
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        if packed:
            size -= LENGTH_BYTES + int.from_bytes(array.numpy()[:LENGTH_BYTES].tobytes(), "little")
    except Exception:
        return len(array.data)
    return size if 0 <= size <= len(array.data) else len(array.data)


def payload_bytes(content: RecordDict) -> int:
    """Payload bytes of all arrays in a message."""
    return sum(nbytes(record) for record in content.array_records.values())
