"""Tensors that travel in one array are the same tensors, of the same bytes."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedlora import wire
from fedlora.errors import UpdateRefused
from fedlora.wire.arrays import is_packed

TENSORS = {
    "b.lora_B.weight": torch.randn(5, 3),
    "a.lora_A.weight": torch.randn(3, 7).T[:, 1:],
    "none": torch.zeros(0, 4),
    "one": torch.tensor(2.5),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tensors", [TENSORS, {}], ids=["some", "none"])
def test_both_forms_hold_the_same(tensors: dict[str, torch.Tensor], dtype: str) -> None:
    usual = wire.to_record(tensors, dtype)
    packed = wire.to_record(tensors, dtype, packed=True)
    assert len(packed) == 1
    one, other = wire.from_record(usual), wire.from_record(packed)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert all(tensor.dtype == torch.float32 for tensor in other.values())
    assert wire.nbytes(packed) == wire.nbytes(usual)


def test_only_one_array_of_that_name_alone_is_packed() -> None:
    packed = wire.to_record(TENSORS, packed=True)
    packed["b.lora_B.weight"] = Array(torch.zeros(5, 3).numpy())
    assert not is_packed(packed)
    with pytest.raises(UpdateRefused, match="array safetensors is uint8"):
        wire.from_record(packed)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.bfloat16])
def test_what_are_no_floats_of_numpy_is_refused(kind: torch.dtype) -> None:
    import numpy as np
    from safetensors.torch import save

    data = np.frombuffer(save({"x": torch.ones(2, dtype=kind)}), np.uint8)
    with pytest.raises(UpdateRefused, match="array x is torch"):
        wire.from_record(ArrayRecord({"safetensors": Array(data)}))
