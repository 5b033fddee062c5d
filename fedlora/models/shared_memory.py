"""A model in two pieces, so that processes of one machine can share its weights: structure and arrays.

The structure is the pickled module without its tensors; the arrays are their bytes. `put_together` copies
nothing: the tensors of the new model are views of the arrays it is given, which may be mapped read-only.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def take_apart(module: nn.Module) -> tuple[bytes, list[np.ndarray]]:
    """The structure of a module and the bytes of each of its tensors, uint8; tied tensors come once.

    Plain tensor attributes (a rotary table) count as much as parameters and buffers.
    """
    file = io.BytesIO()
    pickler = _Structure(file)
    pickler.dump(module)
    return file.getvalue(), pickler.arrays


def put_together(structure: bytes, arrays: Sequence[np.ndarray]) -> nn.Module:
    """The module that `take_apart` took apart, on the CPU, its tensors views of these arrays."""
    module: nn.Module = _Module(io.BytesIO(structure), arrays).load()
    return module


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor of any type, in row-major order; a view where it lies so on the CPU."""
    array: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array


def typed(array: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A view of the bytes of a tensor as that tensor; they may be such as must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(dtype).reshape(shape)


def hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The sha256 of the bytes of each tensor."""
    return {name: sha256(bytes_of(tensor).data).hexdigest() for name, tensor in tensors.items()}


class _Structure(pickle.Pickler):
    """Writes a tensor as its number, type and shape."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.arrays: list[np.ndarray] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # an id is only unique while its object lives

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.arrays)
            self._kept.append(obj)
            self.arrays.append(bytes_of(obj))
        number, kept = self._numbers[id(obj)], isinstance(obj, nn.Parameter)
        return number, obj.dtype, tuple(obj.shape), kept, obj.requires_grad


class _Module(pickle.Unpickler):
    """Reads what `_Structure` wrote; one tensor for each number."""

    def __init__(self, file: io.BytesIO, arrays: Sequence[np.ndarray]) -> None:
        super().__init__(file)
        self._arrays = arrays
        self._tensors: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        number, dtype, shape, parameter, requires_grad = pid
        if number not in self._tensors:
            array = self._arrays[number]
            tensor = typed(array, dtype, shape) if array.size else torch.empty(shape, dtype=dtype)
            if parameter:
                tensor = nn.Parameter(tensor, requires_grad)
            self._tensors[number] = tensor
        return self._tensors[number]
