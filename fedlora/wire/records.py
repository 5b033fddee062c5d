"""Named tensors as Flower's ArrayRecords, and the bytes that they take."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from fedlora.errors import UpdateRefused, first_line
from fedlora.factors import Tensors

ARRAYS, PARTS, CONFIG, METRICS = "arrays", "parts", "config", "metrics"
"""Names of the records in a message."""
DTYPES = {"float32", "float16", "float64"}


def to_record(tensors: Mapping[str, Tensor], dtype: str = "float32") -> ArrayRecord:
    """An ArrayRecord of the tensors as ``float32`` or ``float16``, names kept."""
    kind = getattr(torch, dtype)
    return ArrayRecord(
        {name: Array(t.detach().to("cpu", kind).contiguous().numpy()) for name, t in tensors.items()}
    )


def from_record(record: ArrayRecord) -> Tensors:
    """The tensors of an ArrayRecord.

    Raises:
        UpdateRefused: an array that is not a plain NumPy array of floats, or lies about its shape.
    """
    tensors: Tensors = {}
    for name, array in record.items():
        try:
            decoded = array.numpy()
        except Exception as error:
            raise UpdateRefused(f"array {name} cannot be decoded: {first_line(error)}") from None
        if str(decoded.dtype) not in DTYPES or decoded.shape != tuple(array.shape):
            raise UpdateRefused(
                f"array {name} is {decoded.dtype} {decoded.shape}, announced as {tuple(array.shape)}; "
                f"accepted are {', '.join(sorted(DTYPES))}"
            )
        tensors[name] = torch.from_numpy(np.array(decoded, dtype=np.float32, order="C"))
    return tensors


def read_json(text: object) -> Any:
    """What a text that travelled says, None where it is no JSON."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def nbytes(record: ArrayRecord | None) -> int:
    """Payload bytes: the tensors' own, without names and headers."""
    if record is None:
        return 0
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in record.values())


def payload_bytes(content: RecordDict) -> int:
    """Payload bytes of all arrays in a message."""
    return sum(nbytes(record) for record in content.array_records.values())
