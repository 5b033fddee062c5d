"""Means of scores with discrete Laplace noise: pure differential privacy, with no bit that betrays a term.

Each example has scores in [0, 1], in whole parts of `PARTS`. Their sums, and the count where it is hidden,
are whole numbers and get noise of P(x) ~ exp(-|x| epsilon / D), drawn exactly (Canonne, Kamath and Steinke,
"The discrete Gaussian for differential privacy", NeurIPS 2020, Algorithm 2). D is how much one example moves
all of them together:

    zero_out_one         D = K PARTS            K scores become 0; the count is public and stays
    add_or_remove_one    D = (K + 1) PARTS      the count moves by one, too, and is released in parts as well

so that (Dwork, McSherry, Nissim and Smith, TCC 2006) what is released is epsilon-DP at delta 0.
"""

from __future__ import annotations

import secrets
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

PARTS = 1000


def noisy_means(
    scores: NDArray[np.float64], epsilon: float, *, count_hidden: bool
) -> tuple[list[float], float]:
    """The mean of each score, within [0, 1], and the number of examples: the real one where it is public.

    Args:
        scores: shape (examples, K); what is not finite counts as 1, what is beyond [0, 1] as its end.
        epsilon: of all that is returned.
        count_hidden: neighbours differ by an example more or less; else by one that becomes zeros.
    """
    bounded = np.clip(np.nan_to_num(scores, nan=1.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
    sums = [int(total) for total in np.rint(bounded * PARTS).astype(np.int64).sum(axis=0)]
    count = len(scores) * PARTS
    scale = Fraction((len(sums) + count_hidden) * PARTS) / Fraction(epsilon)
    noisy = [total + discrete_laplace(scale) for total in sums]
    if count_hidden:
        count = max(PARTS, count + discrete_laplace(scale))
    return [min(1.0, max(0.0, total / count)) for total in noisy], count / PARTS


def discrete_laplace(scale: Fraction) -> int:
    """An integer x with P(x) ~ exp(-|x| / scale), from the operating system's entropy, without rounding."""
    t, s = scale.numerator, scale.denominator
    while True:
        part = secrets.randbelow(t)
        if not _bernoulli_exp(part, t):
            continue
        whole = 0
        while _bernoulli_exp(1, 1):
            whole += 1
        size, negative = (part + t * whole) // s, secrets.randbelow(2)
        if size or not negative:
            return -size if negative else size


def _bernoulli_exp(numerator: int, denominator: int) -> bool:
    """True with probability exp(-numerator / denominator), a fraction of at most 1 (their Algorithm 1)."""
    k = 1
    while secrets.randbelow(denominator * k) < numerator:
        k += 1
    return k % 2 == 1
