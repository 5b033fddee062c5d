"""An accelerator without one: the device ``pretend`` computes on the CPU and refuses what a GPU would.

PyTorch lends its PrivateUse1 backend to Python. A tensor here lies in ordinary memory under another device's
name; one fallback renames what an operator is given, lets the CPU compute, and renames what comes out. As on
a GPU it raises where tensors of two devices meet (one without dimensions may come from the CPU), and where a
generator is the CPU's. Registration holds for the whole process: import this in one of its own.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.dlpack import from_dlpack, to_dlpack

NAME = "pretend"
CPU, EXTENSION = 1, 12
"""Devices by DLPack's numbers; torch reads the second as PrivateUse1."""
DEVICE_AT = 8
"""Bytes before a DLManagedTensor's type of device: its pointer to the data."""
INDICES_FROM_CPU = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"}
"""Operators that fetch indices from the CPU by themselves."""
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""Operators whose result, or its size, the host waits for."""
SYNCHRONISATIONS: Counter[str] = Counter()
"""How often the host waited for the device: a number read, or a tensor copied from it."""

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _renamed(tensor: Tensor, kind: int) -> Tensor:
    """The same memory under another device's name."""
    capsule = to_dlpack(tensor)
    address = _pointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(address + DEVICE_AT).value = kind
    found: Tensor = from_dlpack(capsule)
    return found


def on_cpu(tensor: Tensor) -> Tensor:
    return _renamed(tensor, CPU)


def on_device(tensor: Tensor) -> Tensor:
    return _renamed(tensor, EXTENSION)


class _Generator(torch.Generator):
    """torch's, which also takes this device: a CPU generator that is known to belong here."""

    here: ClassVar[WeakSet[_Generator]] = WeakSet()

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != NAME:
            return super().__new__(cls, device)
        made = super().__new__(cls, "cpu")
        cls.here.add(made)
        return made


class _Module:
    """What torch asks a backend's module for."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing: the CPU's own generator draws what no other one draws."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The operator on the CPU, with the rules of a device."""
    name = op._schema.name
    if name == "aten::as_strided":
        return _strided(*args, **kwargs)
    if name == "aten::_copy_from":
        return _copy(*args[:2])
    if name in WAITS:
        SYNCHRONISATIONS[name] += 1
    given: dict[int, tuple[Tensor, Tensor]] = {}
    own = [_lowered(value, op, given) for value in args]
    found = op(*own, **{key: _lowered(value, op, given) for key, value in kwargs.items()})
    for here, cpu in given.values():
        if here.shape != cpu.shape:  # an empty output that the operator made room for
            here.data = on_device(cpu)
    written = {id(cpu): here for here, cpu in given.values()}
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
    base = next(iter(given.values()))[0] if is_view else None
    return _raised(found, written, base)


def _lowered(value: Any, op: Any, given: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """What the CPU gets for an argument; ``given`` learns of tensors."""
    if isinstance(value, Tensor):
        if not _is_here(value):
            _refuse_elsewhere(value, op)
            return value
        if id(value) not in given:
            given[id(value)] = (
                value,
                on_cpu(value) if value.numel() else torch.empty_like(value, device="cpu"),
            )
        return given[id(value)][1]
    if isinstance(value, list | tuple):
        return [_lowered(v, op, given) for v in value]
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch._C.Generator):  # an object of its own, though the same generator
        state = value.get_state()
        if not any(torch.equal(state, own.get_state()) for own in _Generator.here):
            raise RuntimeError(f"{op}: expected a generator of {NAME}, found one of the CPU")
    return value


def _raised(value: Any, written: dict[int, Tensor], base: Tensor | None) -> Any:
    """What the device gives for a result of the CPU."""
    if isinstance(value, list | tuple):
        return type(value)(_raised(v, written, base) for v in value)
    if not isinstance(value, Tensor):
        return value
    if id(value) in written:
        return written[id(value)]
    return on_device(value) if base is None else _view(base, value)


def _is_here(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _refuse_elsewhere(value: Tensor, op: Any) -> None:
    if value.ndim > 0 and op.name() not in INDICES_FROM_CPU:
        raise RuntimeError(
            f"{op}: expected all tensors to be on {NAME}, one of {tuple(value.shape)} is on {value.device}"
        )


def _strided(tensor: Tensor, size: Any, stride: Any, offset: int | None = None) -> Tensor:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # its kernel reads no data
    found: Tensor = torch.ops.aten.as_strided.default.redispatch(keys, tensor, size, stride, offset)
    return found


def _view(base: Tensor, cpu: Tensor) -> Tensor:
    """A view of ``base`` that lies where ``cpu`` does, in the same storage."""
    if cpu.dtype != base.dtype:
        return on_device(cpu)
    offset = (cpu.data_ptr() - base.untyped_storage().data_ptr()) // base.itemsize if cpu.numel() else 0
    return _strided(base, cpu.shape, cpu.stride(), offset)


def _copy(source: Tensor, target: Tensor) -> Tensor:
    """The one operator that two devices may meet in."""
    if _is_here(source) and not _is_here(target):
        SYNCHRONISATIONS["copy to the CPU"] += 1
    own = on_cpu(target) if _is_here(target) else target
    own.copy_(on_cpu(source) if _is_here(source) else source)
    return target


def _copied(self: Tensor, memo: dict[int, Any]) -> Any:
    """As torch's ``__deepcopy__``, which copies a storage: of this device none can be made in Python."""
    if not _is_here(self):
        return _DEEPCOPY(self, memo)
    return memo.setdefault(id(self), self.detach().clone())


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_compute, "PrivateUse1")
torch.Generator = _Generator  # type: ignore[misc]
_DEEPCOPY = Tensor.__deepcopy__
Tensor.__deepcopy__ = _copied  # type: ignore[method-assign]
