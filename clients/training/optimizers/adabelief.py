"""AdaBelief: Adam whose second moment is of the gradient's distance from its running mean.

Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", NeurIPS 2020
(arXiv 2010.07468), Algorithm 2, with decoupled weight decay (its section on AdamW's):

    m <- b1 m + (1 - b1) g,    s <- b2 s + (1 - b2) (g - m)^2 + eps
    p <- (1 - lr weight_decay) p - lr  m / (1 - b1^t) / (sqrt(s / (1 - b2^t)) + eps)

The released package's rectification (RAdam's) is not part of the algorithm, and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fedlora.errors import ConfigError


class AdaBelief(torch.optim.Optimizer):
    """Steps of the size of the learning rate where gradients stay as they were, smaller ones elsewhere.

    Args:
        groups: parameter groups.
        lr: of groups that have none of their own.
        betas: (b1, b2), each >= 0 and < 1.
        eps: > 0.
        weight_decay: ``train.weight-decay``.

    Raises:
        ConfigError: others.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
    ) -> None:
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"train.optimizer-options betas = {list(betas)}: must be two numbers >= 0, < 1")
        if eps <= 0:
            raise ConfigError(f"train.optimizer-options eps = {eps}: must be > 0")
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            (b1, b2), eps = group["betas"], group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"steps": 0, "m": torch.zeros_like(p), "s": torch.zeros_like(p)}
                state["steps"] += 1
                t, m, s = state["steps"], state["m"], state["s"]
                m.lerp_(p.grad, 1 - b1)
                surprise = p.grad - m
                s.mul_(b2).addcmul_(surprise, surprise, value=1 - b2).add_(eps)
                root = (s / (1 - b2**t)).sqrt_().add_(eps)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(m, root, value=-group["lr"] / (1 - b1**t))
