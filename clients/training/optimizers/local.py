"""Base of optimisers that see an adapted layer whole: A beside B, the core if there is one, and the scaling.

Such an optimiser is a ``torch.optim.Optimizer`` with a parameter group for each layer, so that the same code
steps one by one, privately and in cohorts: Opacus calls its ``step`` after clipping and noise, where a
gradient is public already and whatever is made of it costs no privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted layer, y = W x + s B R A x (mostly without R), as it is now.

    Attributes:
        name: of the layer.
        factors: all of them by letter, trained or not: A (r, in), B (out, r), R (r, r); with a leading
            dimension of clients where the optimiser is `LocalOptimizer.stacked`.
        trained: the letters that are trained.
        scaling: s; (clients, 1, 1) where the factors have that dimension.
    """

    name: str
    factors: Mapping[str, Tensor]
    trained: tuple[str, ...]
    scaling: float | Tensor

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Of the factors that are trained and take part in the loss."""
        grads = {letter: self.factors[letter].grad for letter in self.trained}
        return {letter: grad for letter, grad in grads.items() if grad is not None}


class LocalOptimizer(torch.optim.Optimizer):
    """Momentum, decoupled weight decay and a step along `direction`; the head moves by its own gradient.

        m <- momentum m + direction,    p <- (1 - lr weight_decay) p - lr m

    Args:
        groups: one for each adapted layer, with its `Layer` as ``layer``, and one for the head.
        lr: of groups that have none of their own.
        momentum: ``train.momentum``.
        weight_decay: ``train.weight-decay``.

    Attributes:
        stacked: the arithmetic holds with a leading dimension of clients too (batched products, ``.mT``), and
            rows and columns of zeros, which fill up smaller ranks, change nothing: a cohort then steps at
            once. Otherwise each of its clients has an optimiser of its own.
    """

    stacked: ClassVar[bool] = False

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def direction(self, layer: Layer) -> Mapping[str, Tensor]:
        """Directions that the trained factors of a layer move against, in place of their gradients.

        Args:
            layer: all its gradients are there.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every layer and the head."""
        for group in self.param_groups:
            layer: Layer | None = group.get("layer")
            if layer is None:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group)
            elif len(layer.gradients) == len(layer.trained):
                directions = self.direction(layer)
                for letter in layer.trained:
                    self._move(layer.factors[letter], directions[letter], group)

    def _move(self, parameter: Tensor, direction: Tensor, group: Mapping[str, Any]) -> None:
        if group["momentum"]:
            state = self.state[parameter]
            if "momentum_buffer" in state:
                direction = state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
            else:
                state["momentum_buffer"] = direction.clone()
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
