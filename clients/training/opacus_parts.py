"""Opacus' hooks and optimiser for a `Mechanism`, and noise from the operating system for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from clients.training.clip_shares import tensor_clips
from fedlora.models import AdaptedModel
from fedlora.privacy.entropy import on_grid, system_normal

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer

    from clients.training.dp_mechanism import Mechanism


def watched_model(model: AdaptedModel, mechanism: Mechanism) -> Any:
    """Opacus' hooks; the loss is summed over the batch, so that no example's gradient knows the others."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    if mechanism.grad_sample_mode == "ghost":
        return GradSampleModuleFastGradientClipping(
            model.module, loss_reduction="sum", max_grad_norm=mechanism.max_grad_norm
        )
    return GradSampleModule(model.module, loss_reduction="sum")


def private_optimizer(
    optimizer: torch.optim.Optimizer,
    mechanism: Mechanism,
    generator: torch.Generator | None,
    names: Sequence[str],
) -> DPOptimizer:
    """Opacus' optimiser for that mode and clipping, with the system's noise if it is to be secure.

    Args:
        optimizer: over exactly the trained tensors.
        mechanism: what a step does.
        generator: draws the noise unless ``mechanism.secure``.
        names: of the optimiser's tensors, in its order.
    """
    from opacus.optimizers import get_optimizer_class

    mode = "ghost" if mechanism.grad_sample_mode == "ghost" else "hooks"
    kind = get_optimizer_class(mechanism.clipping.replace("-", "_"), distributed=False, grad_sample_mode=mode)
    if mechanism.secure:
        kind = type(f"SystemNoise{kind.__name__}", (SystemNoise, kind), {})
    clip: float | list[float] = mechanism.max_grad_norm
    if mechanism.clipping == "per-layer":
        clip = tensor_clips(names, mechanism.max_grad_norm, mechanism.shares)
    return kind(
        optimizer,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=clip,
        expected_batch_size=mechanism.expected_batch_size,
        generator=generator,
    )


class SystemNoise:
    """Mixed into any of Opacus' optimisers: noise from the operating system.

    torch's CPU generator keeps only 32 bits of its seed, which can be tried out one by one.
    """

    params: list[Any]
    noise_multiplier: float
    max_grad_norm: float

    def add_noise(self) -> None:
        """``grad = summed_grad + N(0, (noise_multiplier C)^2)``, added in float64 and rounded to a grid."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noisy = on_grid(parameter.summed_grad.cpu().double() + std * system_normal(parameter.shape), std)
            parameter.grad = noisy.to(parameter.dtype).to(parameter.device)
