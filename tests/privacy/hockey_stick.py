"""The epsilon that holds two laws on the line apart after T independent steps, by a computation of its own.

Nothing here is the product's, Opacus' or dp-accounting's: densities on a grid, the privacy loss of one step
on a mesh (its mean kept), composed by one Fourier transform, and the hockey-stick divergence of the result.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

Law = dict[int, float]
"""Value of the clipped sum, in units of the clipping norm -> its probability; the noise comes on top."""
MESH = 5e-4


def sums(many: int, rate: float, one: int = 0, rate_of_one: float = 0.0) -> Law:
    """Of ``many`` aligned examples that count 1 each and one that counts ``one``, each drawn by its rate."""
    law: Law = {}
    for drawn, weight in enumerate(binom.pmf(np.arange(many + 1), many, rate)):
        for value, share in ((drawn, 1 - rate_of_one), (drawn + one, rate_of_one)):
            law[value] = law.get(value, 0.0) + float(weight) * share
    return {value: weight for value, weight in law.items() if weight > 1e-15}


def epsilon(p: Law, q: Law, noise: float, steps: int, delta: float) -> float:
    """The least epsilon that keeps delta in both directions."""
    return max(_one_way(p, q, noise, steps, delta), _one_way(q, p, noise, steps, delta))


def _one_way(p: Law, q: Law, noise: float, steps: int, delta: float) -> float:
    total, composed = _composed(p, q, noise, steps)

    def excess(epsilon: float) -> float:
        return _delta(total, composed, epsilon) - delta

    return 0.0 if excess(0.0) <= 0 else float(brentq(excess, 0.0, 30.0, xtol=1e-4))


def profile_of(p: Law, q: Law, noise: float, steps: int, epsilons: np.ndarray) -> np.ndarray:
    """The delta of each epsilon, in one direction."""
    total, composed = _composed(p, q, noise, steps)
    return np.array([_delta(total, composed, epsilon) for epsilon in epsilons])


def _delta(total: np.ndarray, composed: np.ndarray, epsilon: float) -> float:
    over = total > epsilon
    return float(composed[over] @ -np.expm1(epsilon - total[over]))


def _composed(p: Law, q: Law, noise: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of the privacy loss of all steps, and their probabilities."""
    x = np.linspace(min([*p, *q]) - 8 * noise, max([*p, *q]) + 8 * noise, 30_001)
    P, Q = (sum(w * norm.pdf(x, value, noise) for value, w in law.items()) for law in (p, q))
    mass, loss = P / P.sum(), np.log(P / Q) / MESH
    spread = np.sqrt(steps * (mass @ loss**2 - (mass @ loss) ** 2))
    width = 1 << int(np.ceil(np.log2(40 * spread + 2 * steps * abs(mass @ loss) + 4 * np.abs(loss).max())))
    below, pmf = np.floor(loss).astype(int), np.zeros(width)
    np.add.at(pmf, below % width, mass * (below + 1 - loss))
    np.add.at(pmf, (below + 1) % width, mass * (loss - below))
    composed = np.fft.irfft(np.fft.rfft(pmf) ** steps, width).clip(0)
    place = np.arange(width)
    return MESH * np.where(place < width // 2, place, place - width), composed
