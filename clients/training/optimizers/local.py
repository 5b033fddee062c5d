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

from fedlora.errors import ConfigError

EPS = 1e-8
"""Of the head's division, as Adam's."""


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
    def in_blocks(self) -> bool:
        """Whether there is a core of blocks, ([clients,] h, b, b), in place of a dense one."""
        return "R" in self.factors and self.factors["R"].ndim > self.factors["A"].ndim

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Of the factors that are trained and take part in the loss."""
        grads = {letter: self.factors[letter].grad for letter in self.trained}
        return {letter: grad for letter, grad in grads.items() if grad is not None}

    def mean_square(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Mean square of the entries of the weight's move, to first order; (..., 1, 1).

        ``||s (L_1 R_1 + L_2 R_2 + ...)||_F^2`` by Gram matrices of r x r: no (out, in) matrix is built.
        """
        terms: list[tuple[Tensor, Tensor]] = []
        for letter, direction in directions.items():
            now = {**self.factors, letter: direction}
            terms.append((now["B"] @ now["R"] if "R" in now else now["B"], now["A"]))
        pairs = [
            ((left.mT @ other_left) * (right @ other_right.mT)).sum((-2, -1), keepdim=True)
            for left, right in terms
            for other_left, other_right in terms
        ]
        entries = self.factors["B"].shape[-2] * self.factors["A"].shape[-1]
        return (self.scaling**2 * torch.stack(pairs).sum(0) / entries).clamp_min(0.0)


class LocalOptimizer(torch.optim.Optimizer):
    """Momentum, decoupled weight decay and a step along `direction`; the head moves by its own gradient.

        m <- momentum m + direction,    p <- (1 - lr weight_decay) p - lr m

    With ``beta2`` a layer's direction is first divided by the root of a running mean of its squared size, one
    number a layer (NovoGrad's moment: Ginsburg et al. 2019, arXiv 1905.11286, with Adam's correction of its
    start). The size is that of what the *product* does to the weight, by entry, so that it does not depend on
    how the product is split; a rate is then how far a step moves the entries of the weight:

        v <- beta2 v + (1 - beta2) ||s (B d_A + d_B A)||_F^2 / (out in),    d <- d / sqrt(v / (1 - beta2^t))

    The head's gradients are divided entry by entry, as Adam's.

    Args:
        groups: one for each adapted layer, with its `Layer` as ``layer``, and one for the head.
        lr: of groups that have none of their own.
        momentum: ``train.momentum``.
        weight_decay: ``train.weight-decay``.
        beta2: >= 0 and < 1; 0 leaves directions as they are.

    Raises:
        ConfigError: another ``beta2``, or a core in blocks.

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
        beta2: float = 0.0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if not 0 <= beta2 < 1:
            raise ConfigError(f"train.optimizer-options beta2 = {beta2}: must be >= 0 and < 1")
        self.beta2 = beta2
        layers: list[Layer | None] = [group.get("layer") for group in self.param_groups]
        if any(layer is not None and layer.in_blocks for layer in layers):
            raise ConfigError(
                f"train.optimizer: {type(self).__name__} moves a layer by what its dense factors make of it, "
                "and takes no core in blocks; one that moves each number by itself does (adamw, sgd, torch's)"
            )

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
                        self._move(parameter, self._of_head(parameter, parameter.grad), group)
            elif len(layer.gradients) == len(layer.trained):
                directions = self._of_layer(layer, self.direction(layer))
                for letter in layer.trained:
                    self._move(layer.factors[letter], directions[letter], group)

    def _of_head(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        if not self.beta2:
            return gradient
        return gradient / (self._mean(parameter, gradient.square()).sqrt() + EPS)

    def _of_layer(self, layer: Layer, directions: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.beta2:
            return directions
        mean = self._mean(layer.factors[layer.trained[0]], layer.mean_square(directions))
        scale = torch.where(mean > 0, mean.rsqrt(), 0.0)
        return {letter: scale * direction for letter, direction in directions.items()}

    def _mean(self, parameter: Tensor, square: Tensor) -> Tensor:
        """The running mean of squares that a parameter's state keeps, corrected for its start."""
        state = self.state[parameter]
        state["steps"] = state.get("steps", 0) + 1
        mean: Tensor = state.setdefault("mean_square", torch.zeros_like(square))
        mean.lerp_(square, 1 - self.beta2)
        return mean / float(1 - self.beta2 ** state["steps"])

    def _move(self, parameter: Tensor, direction: Tensor, group: Mapping[str, Any]) -> None:
        if group["momentum"]:
            state = self.state[parameter]
            if "momentum_buffer" in state:
                direction = state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
            else:
                state["momentum_buffer"] = direction.clone()
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
