"""Tests of what a private mechanism drew against the laws that its claim rests on.

Each gives the words for what does not fit, empty if all does. A false alarm is a probability that the parts
of one test share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NOISE_DRAWS, NOISE_AGAIN = 500_000, 40_000
"""Numbers that a self-test of noise draws at least: 1 % too much or too little is 10 standard errors off.
Again, for the same mechanism with another noise or norm: 5 % is 14."""
Sizes = Sequence[int]
"""Examples in each drawn batch."""


def flaw_of_noise(steps: Sequence[Tensor], std: float, false_alarm: float) -> str:
    """Against independent draws from N(0, std^2): size, correlation of pairs, distribution.

    Args:
        steps: the noise of each step, all of one length, float64.
        std: standard deviation; with 0 all must be zero.
        false_alarm: probability with which right noise is found wrong.

    >>> draws = torch.randn(50, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> flaw_of_noise(list(draws), 1.0, 1e-9), flaw_of_noise(list(draws), 2.0, 1e-9)
    ('', 'has standard deviation 1.01, claimed is 2')
    """
    from scipy.stats import chi2, kstest, norm  # half a second

    each = false_alarm / 4
    noise = torch.stack(list(steps))
    numbers, count = noise.flatten(), noise.numel()
    square = float(numbers.square().sum())
    if std == 0:
        return "" if square == 0 else f"has standard deviation {math.sqrt(square / count):.4g}, claimed is 0"
    low, high = chi2.ppf(each / 2, count), chi2.isf(each / 2, count)
    if not low * std**2 <= square <= high * std**2:
        return f"has standard deviation {math.sqrt(square / count):.4g}, claimed is {std:.4g}"
    noise = noise[:, :MOST]
    numbers = noise.flatten()[: 2 * MOST]
    bound = float(norm.isf(each / 6))
    half = max(1, noise.shape[1] // 2)
    lagged = (noise[:, :-1] * noise[:, 1:], noise[:, :-half] * noise[:, half:], noise[:-1] * noise[1:])
    for pairs in lagged:
        widest = bound * FEW[pairs.numel() < ENOUGH_PAIRS] * math.sqrt(max(pairs.numel(), 1))
        if abs(float(pairs.sum())) > widest * std**2:
            return "is correlated from number to number or from step to step"
    if kstest(numbers.numpy(), norm(scale=std).cdf).pvalue < each:
        return "is not normally distributed"
    return ""


MOST = 500_000
"""Numbers of a step that are looked at for more than their size; sorting more takes seconds."""
FEW, ENOUGH_PAIRS = (1.2, 3.0), 400
"""Widens the bound on a sum of few products, which has heavier tails than the normal law."""


def flaw_of_draws(sizes: Sizes, examples: int, rate: float, false_alarm: float) -> str:
    """Against Poisson sampling: all counts together are Binomial(n T, q), and batches differ in size.

    Args:
        sizes: of the batches.
        examples: n, in each of T draws.
        rate: q.
        false_alarm: as for `flaw_of_noise`.

    >>> flaw_of_draws([50] * 100, 100, 0.5, 1e-9)
    'batches of 100 steps differ too little in size for Poisson sampling'
    """
    from scipy.stats import binom

    trials, drawn = len(sizes) * examples, int(sum(sizes))
    low, high = binom.ppf(false_alarm / 4, trials, rate), binom.isf(false_alarm / 4, trials, rate)
    if not low <= drawn <= high:
        return f"{drawn} examples were drawn in {len(sizes)} steps, claimed are about {trials * rate:.0f}"
    return flaw_of_spread([(size, examples, rate) for size in sizes], false_alarm / 2)


def flaw_of_spread(draws: Sequence[tuple[int, int, float]], false_alarm: float) -> str:
    """Sizes of batches vary as Binomial(n, q) does; fixed or shuffled batches vary less.

    Args:
        draws: (size, n, q) of each batch.
        false_alarm: as for `flaw_of_noise`.
    """
    from scipy.stats import chi2

    varying = [(size, n, q) for size, n, q in draws if n * q * (1 - q) >= ENOUGH]
    if len(varying) < ENOUGH:
        return ""
    spread = math.fsum((size - n * q) ** 2 / (n * q * (1 - q)) for size, n, q in varying)
    count = len(varying)
    if spread < chi2.ppf(false_alarm / 2, count) / LOOSE:
        return f"batches of {count} steps differ too little in size for Poisson sampling"
    if spread > chi2.isf(false_alarm / 2, count) * LOOSE:
        return f"batches of {count} steps differ too much in size for Poisson sampling"
    return ""


ENOUGH, LOOSE = 5, 1.2
"""Variance of a size, and steps, from which sizes are taken for normal, and how far they may be from it."""


def flaw_of_pairs(residuals: Sequence[np.ndarray], false_alarm: float) -> str:
    """Against independence: the correlation of two residuals of one length d is N(0, 1/d).

    Those of other lengths, of other tensors, are not compared.
    """
    from scipy.stats import norm

    alike = [[r for r in residuals if len(r) == d] for d in sorted({len(r) for r in residuals})]
    count = sum(len(group) * (len(group) - 1) // 2 for group in alike)
    for group in alike:
        rows = np.stack(group).astype(np.float64)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        if not length.all():
            return "an update without any noise"
        rows = rows / length
        pairs = np.abs((rows @ rows.T)[np.triu_indices(len(rows), 1)])
        bound = float(norm.isf(false_alarm / 2 / max(count, 1))) / math.sqrt(rows.shape[1])
        worst = float(pairs.max(initial=0.0))
        if worst > bound:
            return f"updates share noise: two are correlated by {worst:.2g}, by chance at most {bound:.2g}"
    return ""
