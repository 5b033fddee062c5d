"""Means with discrete Laplace noise: the law, what one example moves, and what the count tells."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import chisquare

from fedlora.privacy import noisy_means as module
from fedlora.privacy.noisy_means import PARTS, discrete_laplace, noisy_means


@pytest.mark.parametrize("scale", [Fraction(3), Fraction(5, 2), Fraction(1, 3)])
def test_the_noise_has_its_law(scale: Fraction) -> None:
    draws, most = 20_000, math.ceil(4 * scale)
    found = Counter(max(-most, min(most, discrete_laplace(scale))) for _ in range(draws))
    ratio = math.exp(-1 / scale)
    law = {x: (1 - ratio) / (1 + ratio) * ratio ** abs(x) for x in range(-most + 1, most)}
    law[most] = law[-most] = (1 - sum(law.values())) / 2
    assert chisquare([found[x] for x in law], [draws * p for p in law.values()]).pvalue > 1e-6


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> list[Fraction]:
    """Scales of the noise, which is left out."""
    asked: list[Fraction] = []
    monkeypatch.setattr(module, "discrete_laplace", lambda scale: asked.append(scale) or 0)
    return asked


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_scale_is_what_one_example_moves_by_epsilon(
    hidden: bool, epsilon: float, scales: list[Fraction]
) -> None:
    """The sums of all neighbours, in parts: at most D apart, and by the worst example exactly D."""
    others = np.random.default_rng(0).random((9, 2))
    apart = []
    for one in ([1.0, 1.0], [0.0, 0.0], [0.4, 1.0], [math.nan, math.inf], [-7.0, 9.0]):
        gone = others if hidden else np.vstack([others, np.zeros(2)])
        sums = []
        for scores in (np.vstack([others, one]), gone):
            means, count = noisy_means(scores, epsilon, count_hidden=hidden)
            sums.append(np.array([*(mean * count for mean in means), *([count] if hidden else [])]))
        apart.append(PARTS * float(np.abs(sums[0] - sums[1]).sum()))
    assert set(scales) == {Fraction(2 + hidden) * PARTS / Fraction(epsilon)}
    assert max(apart) == pytest.approx(float(scales[0]) * epsilon)
    assert len(scales) == 5 * 2 * (2 + hidden)


def test_a_public_count_is_told_and_a_hidden_one_is_not() -> None:
    scores = np.ones((40, 2))
    assert {noisy_means(scores, 1.0, count_hidden=False)[1] for _ in range(20)} == {40.0}
    told = [noisy_means(scores, 1.0, count_hidden=True)[1] for _ in range(200)]
    assert len(set(told)) > 150
    assert np.std(told) == pytest.approx(math.sqrt(2) * 3, rel=0.4)
    assert np.mean(told) == pytest.approx(40, abs=1.5)


def test_no_example_is_an_answer_where_the_count_is_hidden() -> None:
    means, count = noisy_means(np.zeros((0, 2)), 1.0, count_hidden=True)
    assert count >= 1
    assert all(0 <= mean <= 1 for mean in means)


def test_means_are_near_at_a_large_epsilon() -> None:
    scores = np.column_stack([np.arange(1000) % 2, np.full(1000, 0.3)]).astype(float)
    means, _ = noisy_means(scores, 5.0, count_hidden=False)
    assert means == pytest.approx([0.5, 0.3], abs=0.01)
