"""The identity of a patch: its bytes are counted and its digest depends on all that it holds."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from fedlora.core.base_patches import Patch
from fedlora.core.factors import Product


def product(value: float = 1.0, dtype: torch.dtype = torch.float32) -> Product:
    return Product(torch.full((3, 2), value, dtype=dtype), torch.arange(8, dtype=dtype).reshape(2, 4))


def test_bytes_are_those_of_the_stacked_factors() -> None:
    assert Patch({"a": product(), "b": product()}).nbytes == 2 * 4 * (3 * 2 + 2 * 4)


def test_the_digest_depends_on_values_names_shapes_and_types_only() -> None:
    one = Patch({"a": product(), "b": product(2.0)})
    assert one.digest() == Patch({"b": product(2.0), "a": product()}).digest()
    transposed = Product(torch.ones(2, 3).T, torch.arange(8.0).reshape(2, 4))
    assert one.digest() == Patch({"a": transposed, "b": product(2.0)}).digest()
    right = product().right
    others = [
        Patch({"a": product(), "b": product(2.0000002)}),
        Patch({"a": product(2.0), "b": product()}),
        Patch({"a": product(), "c": product(2.0)}),
        Patch({"a": product()}),
        Patch({"a": product(dtype=torch.float64), "b": product(2.0)}),
        Patch({"a": Product(torch.ones(3, 2), right * torch.tensor([-1.0, 1, 1, 1])), "b": product(2.0)}),
        Patch({"a": Product(torch.ones(6, 1), right.reshape(1, 8)), "b": product(2.0)}),
        Patch({}),
    ]
    digests = {patch.digest() for patch in [one, *others]}
    assert len(digests) == 1 + len(others)


def test_a_patch_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Patch({}).products = {}  # type: ignore[misc]
