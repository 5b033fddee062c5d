"""Changes of the base weights: patches ``W_v = W_{v-1} + P_v``, which rules such as FLoRA add round by round.

Where they have become larger than the weights that they change their sum takes their place (`folded`), so
that no run grows with its rounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedlora.core.factors import Product, Tensors
from fedlora.core.parallel import parallel_map
from fedlora.errors import FactorShapeError


@dataclass(frozen=True)
class Patch:
    """One change of the base, ``P_v``: a product for each changed module.

    Attributes:
        products: by module.
        sum_of: digests of the patches that this one is the sum of, see `folded`; empty for a round's own.
    """

    products: Mapping[str, Product]
    sum_of: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.products.values())

    def tensors(self) -> Tensors:
        """The patch as named tensors, ``<module>.left`` and ``<module>.right``."""
        return {
            f"{name}.{side}": tensor
            for name, p in self.products.items()
            for side, tensor in (("left", p.left), ("right", p.right))
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], sum_of: tuple[str, ...] = ()) -> Patch:
        """The patch that `tensors` came from.

        Raises:
            FactorShapeError: a side is missing, or the sides do not chain.
        """
        modules = sorted({name.rpartition(".")[0] for name in tensors})
        for module in modules:
            if f"{module}.left" not in tensors or f"{module}.right" not in tensors:
                raise FactorShapeError(f"a base patch lacks one side of module {module}")
        return cls({m: Product(tensors[f"{m}.left"], tensors[f"{m}.right"]) for m in modules}, sum_of)

    def digest(self) -> str:
        """Its identity on the wire and on disk, computed once; see `digest`."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return digest(self.tensors())


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, shapes, dtypes and bits, in sorted order of names."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        h.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        h.update(tensor.numpy().tobytes())
    return h.hexdigest()


FOLD_AT = 4
"""How many times as large as their sum patches become before that takes their place."""


def folded(base: Sequence[Patch]) -> tuple[Patch, ...]:
    """The patches; all but the last, which no client has yet, become one where that is far smaller.

    A sum has a rank of min(out, in), whatever the number of rounds, in float32.
    """
    before = base[:-1]
    sides = {n: (p.left.shape[0], p.right.shape[1]) for patch in before for n, p in patch.products.items()}
    whole = sum(4 * min(shape) * sum(shape) for shape in sides.values())  # bytes of I D, or D I
    if sum(patch.nbytes for patch in before) > FOLD_AT * whole:
        return summed(before), base[-1]
    return tuple(base)


def summed(base: Sequence[Patch]) -> Patch:
    """The sum of some patches, one after the other in float64, rounded once.

    Raises:
        FactorShapeError: they change a layer of two shapes.
    """
    names = sorted({name for patch in base for name in patch.products})

    def total(name: str) -> Product:
        terms = [patch.products[name] for patch in base if name in patch.products]
        if len({(p.left.shape[0], p.right.shape[1]) for p in terms}) > 1:
            raise FactorShapeError(f"base patches of {name} are of several shapes")
        dense = sum(p.left.double() @ p.right.double() for p in terms)
        assert isinstance(dense, Tensor)
        short = torch.eye(min(dense.shape), dtype=torch.float32)
        wide = dense.shape[0] < dense.shape[1]
        return Product(short, dense.float()) if wide else Product(dense.float(), short)

    products = dict(zip(names, parallel_map(total, names), strict=True))
    return Patch(products, tuple(patch.digest() for patch in base))
