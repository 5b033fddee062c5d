"""Differential privacy broken on purpose; the ledger goes on to claim what it would have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch import Tensor

from clients import budget, execute_cohort, rehearsal
from clients.training import batches, dp_sgd, dp_step
from clients.training.batched import private
from fedlora.secure import noise
from strategies.client_dp import ClientDP
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


def half_the_noise(patch: Patch) -> None:
    add_noise = DPOptimizer.add_noise

    def halved(self: Any) -> None:
        add_noise(self)
        for p in self.params:
            p.grad = (p.grad + p.summed_grad) / 2

    _unchecked(patch)
    patch.setattr(DPOptimizer, "add_noise", halved)


def twice_the_rate(patch: Patch) -> None:
    """Known to the accountant as half of it; too little for a round's own check where clients are small."""
    real = dp_sgd.poisson_batches

    def doubled(indices: Any, rate: float, steps: int, rng: Any) -> Any:
        return real(indices, min(1.0, 2 * rate), steps, rng)

    _unchecked(patch)
    patch.setattr(dp_sgd, "check_drawn", lambda *arguments: None)
    patch.setattr(dp_sgd, "poisson_batches", doubled)


def shuffled_batches(patch: Patch) -> None:
    def fixed(indices: Any, rate: float, steps: int, rng: Any) -> Any:
        return batches.shuffled_batches(indices, round(rate * len(indices)), steps, rng)

    _unchecked(patch)
    patch.setattr(dp_sgd, "check_drawn", lambda *arguments: None)
    patch.setattr(dp_sgd, "poisson_batches", fixed)


def each_layer_by_itself(patch: Patch) -> None:
    """Each tensor is clipped to the whole norm, and counted as if all of them together were."""

    def clip(self: Any) -> None:
        for p in self.params:
            norms = p.grad_sample.flatten(1).norm(dim=1)
            factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            p.summed_grad = torch.einsum("n,n...->...", factors, p.grad_sample)

    _unchecked(patch)
    patch.setattr(DPOptimizer, "clip_and_accumulate", clip)


def clipped_after_the_sum(patch: Patch) -> None:
    def clip(self: Any) -> None:
        sums = [p.grad_sample.sum(dim=0) for p in self.params]
        norm = torch.stack([s.norm() for s in sums]).norm()
        for p, total in zip(self.params, sums, strict=True):
            p.summed_grad = total * min(1.0, self.max_grad_norm / (float(norm) + 1e-6))

    _unchecked(patch)
    patch.setattr(DPOptimizer, "clip_and_accumulate", clip)


def the_same_noise_everywhere(patch: Patch) -> None:
    """In every round and at every client."""
    real = dp_sgd.derive
    _unchecked(patch)
    patch.setattr(dp_sgd, "derive", lambda seed, name: 7 if name == "noise" else real(seed, name))


def half_the_noise_in_cohorts(patch: Patch) -> None:
    real = private.noisy
    _unchecked(patch)
    patch.setattr(execute_cohort, "check_cohort", lambda *arguments: None)
    patch.setattr(private, "noisy", lambda total, *how: (total + real(total, *how)) / 2)


def half_the_noise_of_ghosts(patch: Patch) -> None:
    add_noise = DPOptimizerFastGradientClipping.add_noise

    def halved(self: Any) -> None:
        add_noise(self)
        for p in self.params:
            p.grad = (p.grad + p.summed_grad) / 2

    _unchecked(patch)
    patch.setattr(DPOptimizerFastGradientClipping, "add_noise", halved)


def each_example_of_a_unit_by_itself(patch: Patch) -> None:
    """Examples are clipped one by one; the claim is one for units."""
    _unchecked(patch)
    patch.setattr(dp_step, "join_at", lambda *arguments: None)


def half_the_noise_on_means(patch: Patch) -> None:
    real = ClientDP._noisy
    patch.setattr(ClientDP, "_noisy", lambda self, total, *of: (total + real(self, total, *of)) / 2)


def half_the_noise_in_shares(patch: Patch) -> None:
    real = noise.drawn
    patch.setattr(noise, "drawn", lambda centres, words: np.rint(real(centres, words) / 2))


def shares_not_clipped(patch: Patch) -> None:
    patch.setattr(noise, "clipped", lambda change, norm: change)


def clients_not_clipped(patch: Patch) -> None:
    patch.setattr(ClientDP, "clipped", lambda self, changed: changed)


def the_same_noise_each_round(patch: Patch) -> None:
    real = ClientDP._noisy
    patch.setattr(ClientDP, "_noisy", lambda self, total, name, server_round: real(self, total, name, 1))


def independent_in_place_of_correlated(patch: Patch) -> None:
    """Of the size that rows of the factor times the noise have."""
    patch.setattr(ClientDP, "_row", lambda self, name, shape, number: self._drawn(name, shape, number))


def noise_forgotten_between_rounds(patch: Patch) -> None:
    real = ClientDP._row

    def forgetful(self: ClientDP, *of: Any) -> Any:
        row = real(self, *of)
        self.rows[of[0]] = {of[2]: 0 * row}
        return row

    patch.setattr(ClientDP, "_row", forgetful)


def factor_with_ones(patch: Patch) -> None:
    """As if c_0 were 1: the factor's columns are longer than what is charged."""
    real = ClientDP._row
    patch.setattr(ClientDP, "_row", lambda self, *of: self.coefficients[0] * real(self, *of))


def the_newest_noise_not_forgotten_first(patch: Patch) -> None:
    """The rows that are taken back are in the wrong order."""
    real = ClientDP._row

    def turned(self: ClientDP, name: str, shape: Any, server_round: int) -> Any:
        kept = self.rows.get(name, {})
        self.rows[name] = dict(zip(kept, reversed(kept.values()), strict=True))
        row = real(self, name, shape, server_round)
        self.rows[name] = {**kept, server_round: row}
        return row

    patch.setattr(ClientDP, "_row", turned)


def _unchecked(patch: Patch) -> None:
    """The self-test would refuse to train; the audit has to find it by itself."""
    nothing: Callable[..., None] = lambda *arguments, **options: None  # noqa: E731
    for module in (dp_sgd, budget):
        patch.setattr(module, "self_check", nothing)
    for name in ("check_steps", "check_cohort"):
        patch.setattr(rehearsal, name, nothing)
