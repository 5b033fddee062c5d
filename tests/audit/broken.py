"""Differential privacy broken on purpose; the ledger goes on to claim what it would have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from clients import budget, rehearsal
from clients.training import dp_sgd
from strategies.rule import Rule

Patch = pytest.MonkeyPatch
HEAD = slice(-2, None)
"""Weight and bias of the head are the last of the trained tensors."""


def no_noise(patch: Patch) -> None:
    def silent(self: Any) -> None:
        for p in self.params:
            p.grad = p.summed_grad.clone()

    _unchecked(patch)
    patch.setattr(DPOptimizer, "add_noise", silent)


def noise_after_averaging_only(patch: Patch) -> None:
    """The server noises the mean far more than the clients would have: what they ship is clean."""
    aggregate = Rule.aggregate

    def noised(self: Rule, state: Any, updates: Any, **options: Any) -> Any:
        after, diagnostics = aggregate(self, state, updates, **options)
        generator = torch.Generator().manual_seed(after.round)

        def noisy(tensor: Tensor) -> Tensor:
            return tensor + 0.1 * torch.randn(tensor.shape, generator=generator)

        adapters = {n: replace(f, A=noisy(f.A), B=noisy(f.B)) for n, f in after.adapters.items()}
        head = {name: noisy(tensor) for name, tensor in after.head.items()}
        return replace(after, adapters=adapters, head=head), diagnostics

    no_noise(patch)
    patch.setattr(Rule, "aggregate", noised)


def head_left_out(patch: Patch) -> None:
    """The head moves by its plain gradient; the factors are clipped and noised as they should be."""
    clip, add_noise = DPOptimizer.clip_and_accumulate, DPOptimizer.add_noise

    def clip_factors(self: Any) -> None:
        for p in self.params[HEAD]:
            p.plain = p.grad_sample.sum(dim=0)
            p.grad_sample = torch.zeros_like(p.grad_sample)
        clip(self)

    def noise_on_factors(self: Any) -> None:
        add_noise(self)
        for p in self.params[HEAD]:
            p.grad = p.plain

    _unchecked(patch)
    patch.setattr(DPOptimizer, "clip_and_accumulate", clip_factors)
    patch.setattr(DPOptimizer, "add_noise", noise_on_factors)


def no_clipping(patch: Patch) -> None:
    def plain_sum(self: Any) -> None:
        for p in self.params:
            p.summed_grad = p.grad_sample.sum(dim=0)

    _unchecked(patch)
    patch.setattr(DPOptimizer, "clip_and_accumulate", plain_sum)


def _unchecked(patch: Patch) -> None:
    """The self-test would refuse to train; the audit has to find it by itself."""
    nothing: Callable[..., None] = lambda *arguments, **options: None  # noqa: E731
    for module in (dp_sgd, budget):
        patch.setattr(module, "self_check", nothing)
    for name in ("check_steps", "check_cohort"):
        patch.setattr(rehearsal, name, nothing)
