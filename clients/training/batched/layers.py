"""One forward pass over rows of different clients: each row meets its own client's adapter and head.

For row i of client k, ``y_i = W x_i + s_k B_k R_k A_k dropout(x_i)``, and a second product of x_i where one
stands beside; the base W is applied to all rows at once, the factors by one batched product. The model's own
adapter and head take no part and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clients.training.batched.stacks import BESIDE
from fedlora.core.factors import after_core
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel
from fedlora.models.gradient_checkpointing import recomputed
from fedlora.models.packed_linear import Forward, between, frozen_forwards

Dropout = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class ForwardContext:
    """Context of the pass that is on its way, for the layers.

    Attributes:
        values: each row's own tensors, (rows, ...), by name as in `StackedAdapters`; B is scaled.
        number: of rows.
        dropout: on an adapter's input; None where there is none.
    """

    values: Mapping[str, Tensor]
    number: int
    dropout: Dropout | None = None


class Route:
    """Leads the model's layers to the current `ForwardContext`.

    Attributes:
        context: to be set before each forward pass.
    """

    def __init__(self) -> None:
        self.context: ForwardContext | None = None

    @property
    def current(self) -> ForwardContext:
        """The pass that is on its way."""
        assert self.context is not None, "no pass is on its way"
        return self.context


def why_alone(model: AdaptedModel) -> str:
    """Reason that clients of this model train one by one; empty if they can train together."""
    if not model.adapter.batched:
        return "their adapters are none of LoRA"
    for name in sorted({name.rpartition(".")[0] for name in model.initial_head}):
        layer = model.module.get_submodule(name)
        if type(layer) is not nn.Linear:
            return f"the head's {name} is a {type(layer).__name__}, not a linear layer"
    return ""


@contextmanager
def row_wise(model: AdaptedModel, route: Route) -> Iterator[None]:
    """Inside, the model computes row-wise, in evaluation mode; afterwards it is as it was."""
    network = model.module
    layers = model.frozen
    forwards = frozen_forwards(model, model.precision)
    replaced: dict[str, Callable[..., Tensor]] = {}
    for name in layers:
        replaced[name] = _adapted(name, forwards[name], route) if name in model.modules else forwards[name]
    for name in {name.rpartition(".")[0] for name in model.initial_head}:
        replaced[name] = _head(name, route)
    network.eval()
    try:
        for name, forward in replaced.items():
            network.get_submodule(name).forward = forward
        with recomputed(network, model.checkpointing), between(model, model.precision):
            yield
    finally:
        for name in replaced:
            vars(network.get_submodule(name)).pop("forward", None)
        route.context = None


def _adapted(name: str, frozen: Forward, route: Route) -> Callable[..., Tensor]:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        context = route.current
        y = frozen(x)
        _check(name, x, context)
        A = context.values[f"{name}.A"]  # (rows, r, in), float32 over a base in half precision too
        inner = _tokens(x if context.dropout is None else context.dropout(x))  # (rows, tokens, in)
        hidden = torch.bmm(inner.to(A.dtype), A.transpose(1, 2))  # (rows, tokens, r)
        core = context.values.get(f"{name}.R")
        if core is not None:
            hidden = after_core(core, hidden.mT).mT
        outer = context.values[f"{name}.B"].transpose(1, 2)  # (rows, r, out)
        found = torch.baddbmm(_tokens(y).to(A.dtype), hidden, outer)
        held = [context.values.get(f"{name}.{BESIDE}.{x}") for x in ("A", "B")]
        if held[0] is not None and held[1] is not None:
            beside = torch.bmm(_tokens(x).to(A.dtype), held[0].transpose(1, 2))
            found = torch.baddbmm(found, beside, held[1].transpose(1, 2))
        return found.to(y.dtype).view_as(y)

    return forward


def _head(name: str, route: Route) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        context = route.current
        _check(name, x, context)
        weight = context.values[f"{name}.weight"]  # (rows, labels, in)
        y = torch.bmm(_tokens(x), weight.transpose(1, 2))
        bias = context.values.get(f"{name}.bias")
        if bias is not None:
            y = y + bias.unsqueeze(1)
        return y.view(*x.shape[:-1], weight.shape[1])

    return forward


def _check(name: str, x: Tensor, context: ForwardContext) -> None:
    if x.shape[0] != context.number or not 2 <= x.ndim <= 3:
        raise RunFailed(
            f"engine.cohort-size: {name} of this model mixes examples, its input is {tuple(x.shape)} for "
            f"{context.number} of them; use engine.cohort-size = 1"
        )


def _tokens(x: Tensor) -> Tensor:
    """(rows, in) as (rows, 1, in); (rows, tokens, in) as it is."""
    return x.unsqueeze(1) if x.ndim == 2 else x
