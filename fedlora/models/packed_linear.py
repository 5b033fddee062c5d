"""Frozen linear layers through oneDNN, their weights laid out once for its kernels.

On a processor these products are four fifths of a training step and more of an evaluation. oneDNN
multiplies float32 matrices in float32, a rounding apart from torch's own product. For
``train.precision = "bfloat16"`` these products alone are in half precision, summed in float32; everything
between them stays float32, which on a processor is faster than half precision throughout, and more exact.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.models import AdaptedModel

MOST_BYTES = 256 * 2**20
"""Weights of a model that are laid out at most: each is kept twice more, for either direction, and half as
much again where training is in bfloat16, evaluation in float32."""
OPERATORS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
"""torch's private operators that this module calls, all of them and nowhere else."""
ROWS = 512
"""Tokens of a pass for which the layout is chosen."""
Forward = Callable[[Tensor], Tensor]


@contextmanager
def packed_base(model: AdaptedModel, precision: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, the base's layers are computed through `frozen_forwards`; afterwards the model is as it was.

    Args:
        model: any; where packing does not pay, nothing changes.
        precision: of passes, as in `AdaptedModel.computing`.
    """
    if not packs(model, precision):
        yield
        return
    forwards = frozen_forwards(model, precision)
    if not model.adapter.batched:  # a tuner may change in place what its layer's base gives
        forwards = {name: forward for name, forward in forwards.items() if name not in model.modules}
    try:
        for name, forward in forwards.items():
            vars(model.frozen[name])["forward"] = forward
        with model.computing(torch.float32):
            yield
    finally:
        for layer in model.frozen.values():
            vars(layer).pop("forward", None)


@contextmanager
def evaluating(model: AdaptedModel, precision: str) -> Iterator[None]:
    """Inside, passes are computed in a precision, the base's layers packed where that may be and pays.

    Args:
        model: any.
        precision: as ``evaluation-precision``.

    Raises:
        ConfigError: the device has no such arithmetic.
    """
    kind = getattr(torch, precision)
    with model.computing(kind), packed_base(model, kind):
        yield


def tell_if_emulated(model: AdaptedModel, precision: str) -> None:
    """Say once where evaluation in half precision gains nothing."""
    if precision == "bfloat16" and model.device.type == "cpu" and not has_onednn(torch.bfloat16):
        _tell("evaluation-precision = 'bfloat16': emulated on this processor, slower than 'float32'")


def between(model: AdaptedModel, precision: torch.dtype) -> AbstractContextManager[None]:
    """Inside, passes are float32 between packed layers; where none is packed, as they would be."""
    return model.computing(torch.float32) if packs(model, precision) else nullcontext()


def frozen_forwards(model: AdaptedModel, precision: torch.dtype) -> dict[str, Forward]:
    """The forward of each frozen layer, without hooks: packed where that may be and pays, else its own."""
    pack = packs(model, precision)
    return {
        name: _packed_forward(packed(model, name, precision), layer.bias)
        if pack and type(layer) in (nn.Linear, Conv1D)
        else partial(type(layer).forward, layer)
        for name, layer in model.frozen.items()
    }


def packs(model: AdaptedModel, precision: torch.dtype) -> bool:
    """Whether a model's frozen layers can be packed, and whether it pays."""
    weights = [layer.weight for layer in model.frozen.values()]
    return (
        model.device.type == "cpu"
        and all(weight.dtype == torch.float32 for weight in weights)
        and sum(weight.nbytes for weight in weights) <= MOST_BYTES
        and has_onednn(precision)
    )


def has_onednn(precision: torch.dtype) -> bool:
    """Whether this torch has the private operators that are used here, and this processor the arithmetic.

    This is the one switch: where it says no, every layer is computed by torch's own product.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    lacking = [name for name in OPERATORS if not hasattr(torch.ops.mkldnn, name)]
    if lacking:
        _tell(f"torch {torch.__version__} has no mkldnn.{lacking[0]}: frozen layers are not packed, slower")
        return False
    return precision != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def _tell(line: str) -> None:
    """Say a line once in a process."""
    logging.getLogger("fedlora").warning(line)


@dataclass(frozen=True, slots=True)
class Packed:
    """A frozen weight in oneDNN's layout.

    Attributes:
        source: the weight that it was made from, held so that no other can take its address.
        forth: for ``x W^T``.
        back: for ``g W``.
    """

    source: Tensor
    forth: Tensor
    back: Tensor


def packed(model: AdaptedModel, name: str, precision: torch.dtype = torch.float32) -> Packed:
    """A frozen layer's weight, packed; anew only when the base has moved.

    Weights are never written in place (see `PatchedBase`), so that another weight has another address.
    """
    layer = model.frozen[name]
    weight: Tensor = layer.weight.detach()
    found: Packed | None = model.packed.get((name, precision))
    if found is None or found.source.data_ptr() != weight.data_ptr():
        matrix = (weight.T if isinstance(layer, Conv1D) else weight).to(precision)
        found = model.packed[name, precision] = Packed(weight, _laid_out(matrix), _laid_out(matrix.T))
    return found


class PackedLinear(torch.autograd.Function):
    """``x W^T + b`` of a frozen layer, float32 in and out; the gradient goes to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        ctx.back = weight.back
        return _product(x, weight.forth, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _product(gradients[0].contiguous(), ctx.back, None), None, None


def _packed_forward(weight: Packed, bias: Tensor | None) -> Forward:
    def forward(x: Tensor) -> Tensor:
        if x.requires_grad:
            y: Tensor = PackedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
            return y
        return _product(x, weight.forth, bias)

    return forward


def _laid_out(matrix: Tensor) -> Tensor:
    laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), ROWS)
    return laid_out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kind = weight.dtype
    bias = None if bias is None else bias.to(kind)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(kind), weight, bias, "none", [], "")
    return y.to(x.dtype)
