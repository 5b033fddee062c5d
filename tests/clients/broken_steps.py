"""What a library, or a change of ours, could do wrong in private steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import opacus.grad_sample
import pytest
import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping, DPPerLayerOptimizer
from torch import Tensor

from clients.training.opacus_parts import SystemNoise

Break = Callable[[pytest.MonkeyPatch], None]
LINEAR = torch.nn.Linear


def mean_for_sum(patch: pytest.MonkeyPatch) -> None:
    """Opacus is told that the loss is a mean, and multiplies what it finds by the batch."""
    for name in ("GradSampleModule", "GradSampleModuleFastGradientClipping"):
        real = getattr(opacus.grad_sample, name)

        def told(network: Any, *, loss_reduction: str, real: Any = real, **options: Any) -> Any:
            return real(network, loss_reduction="mean", **options)

        patch.setattr(opacus.grad_sample, name, told)


def sampler(change: Callable[[Tensor], Tensor]) -> Break:
    """Every linear layer's hook gives something else, for both kinds of hooks."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        for table in (GradSampleModule.GRAD_SAMPLERS, GradSampleModuleFastGradientClipping.NORM_SAMPLERS):
            real = table[LINEAR]

            def call(*arguments: Any, real: Any = real) -> Any:
                return {p: change(g) for p, g in real(*arguments).items()}

            patch.setitem(table, LINEAR, call)

    return broken


def one_layer_doubled(patch: pytest.MonkeyPatch) -> None:
    """Only in the layer with the fewest numbers, which is easy to overlook."""
    for table in (GradSampleModule.GRAD_SAMPLERS, GradSampleModuleFastGradientClipping.NORM_SAMPLERS):
        real = table[LINEAR]

        def call(layer: Any, *arguments: Any, real: Any = real) -> Any:
            found = real(layer, *arguments)
            return {p: 2 * g for p, g in found.items()} if layer.bias is not None else found

        patch.setitem(table, LINEAR, call)


def unscaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DPOptimizer, "scale_grad", lambda _: None)


def unclipped(patch: pytest.MonkeyPatch) -> None:
    """Everybody's gradient is added as it is."""

    def clip_and_accumulate(self: Any) -> None:
        for parameter in self.params:
            parameter.summed_grad = parameter.grad_sample.sum(dim=0)

    patch.setattr(DPOptimizer, "clip_and_accumulate", clip_and_accumulate)
    patch.setattr(DPPerLayerOptimizer, "clip_and_accumulate", clip_and_accumulate)
    ones = GradSampleModuleFastGradientClipping.get_norm_sample
    patch.setattr(
        GradSampleModuleFastGradientClipping, "get_clipping_coef", lambda self: torch.ones_like(ones(self))
    )


def noise_again(patch: pytest.MonkeyPatch) -> None:
    """What was drawn first for a tensor is its noise in every step."""
    for kind in (DPOptimizer, DPOptimizerFastGradientClipping, SystemNoise):
        real, first = kind.__dict__["add_noise"], dict[int, torch.Tensor]()

        def add_noise(self: Any, real: Any = real, first: Any = first) -> None:
            real(self)
            for number, parameter in enumerate(self.params):
                noise = parameter.grad - parameter.summed_grad
                if noise.any():
                    parameter.grad = parameter.summed_grad + first.setdefault(number, noise)

        patch.setattr(kind, "add_noise", add_noise)


def noise_times(factor: float, only: int | None = None) -> Break:
    """All noise is that much larger, or only that on one tensor."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        for kind in (DPOptimizer, DPOptimizerFastGradientClipping, SystemNoise):
            real = kind.__dict__["add_noise"]

            def add_noise(self: Any, real: Any = real) -> None:
                real(self)
                for number, parameter in enumerate(self.params):
                    if only in (None, number):
                        noise = parameter.grad - parameter.summed_grad
                        parameter.grad = parameter.summed_grad + factor * noise

            patch.setattr(kind, "add_noise", add_noise)

    return broken


def noise_through(change: Callable[[Tensor], Tensor]) -> Break:
    """All noise is made into other noise of the same size."""

    def broken(patch: pytest.MonkeyPatch) -> None:
        for kind in (DPOptimizer, DPOptimizerFastGradientClipping, SystemNoise):
            real = kind.__dict__["add_noise"]

            def add_noise(self: Any, real: Any = real) -> None:
                real(self)
                for parameter in self.params:
                    noise = parameter.grad - parameter.summed_grad
                    if noise.any():
                        std = self.noise_multiplier * self.max_grad_norm
                        std = std if isinstance(std, float) else self.noise_multiplier * 0.5
                        parameter.grad = parameter.summed_grad + std * change(noise.flatten() / std).reshape(
                            noise.shape
                        )

            patch.setattr(kind, "add_noise", add_noise)

    return broken


def each_twice(noise: Tensor) -> Tensor:
    return noise[: (len(noise) + 1) // 2].repeat_interleave(2)[: len(noise)]


def neighbours_alike(noise: Tensor) -> Tensor:
    return (noise + 0.2 * noise.roll(1)) / (1 + 0.2**2) ** 0.5


def as_uniform(noise: Tensor) -> Tensor:
    return (torch.special.ndtr(noise) - 0.5) * 12**0.5


BEFORE_NOISE: dict[str, tuple[Break, str]] = {
    "mean for sum": (mean_for_sum, r"per-example gradient"),
    "doubled": (sampler(lambda g: 2 * g), r"per-example gradient"),
    "one layer doubled": (one_layer_doubled, r"per-example gradient(s| norms) of classifier\.weight"),
    "mixed up": (sampler(lambda g: g.roll(1, dims=0)), r"per-example gradient"),
    "not averaged": (unscaled, r"the noise-free step of \S+: wrong"),
    "not clipped": (unclipped, r"the clipped step of \S+: wrong"),
}
WHO_DRAWS: dict[str, tuple[Break, str]] = {
    "half the noise": (
        noise_times(0.5),
        r"the noise on \S+ has standard deviation 0\.012\d*, claimed is 0\.025",
    ),
    "the same again": (noise_again, "the same noise came twice"),
    "one tensor bare": (noise_times(0.0, only=1), r"the noise on \S+ has standard deviation 0,"),
}
IN_THE_NUMBERS: dict[str, tuple[Break, str]] = {
    "5 % too little": (noise_times(1 / 1.05), r"the noise on .+ has standard deviation"),
    "5 % too much": (noise_times(1.05), r"the noise on .+ has standard deviation"),
    "1 % too much": (noise_times(1.01), r"the noise on .+ has standard deviation"),
    "each number twice": (noise_through(each_twice), r"the noise on .+ is correlated"),
    "correlated": (noise_through(neighbours_alike), r"the noise on .+ is correlated from number to number"),
    "uniform": (noise_through(as_uniform), r"the noise on .+ is not normally distributed"),
}
"""What is found in the numbers that were drawn, whoever drew them."""
BREAKS = {**BEFORE_NOISE, **WHO_DRAWS, **IN_THE_NUMBERS}
