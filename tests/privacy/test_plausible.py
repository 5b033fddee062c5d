"""The laws that draws are held to: right ones pass at any seed, each planted flaw is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.privacy.plausible import flaw_of_draws, flaw_of_noise, flaw_of_pairs, flaw_of_spread

FALSE_ALARM = 1e-9


def noise(seed: int, steps: int = 30, size: int = 2000) -> list[torch.Tensor]:
    return list(torch.from_numpy(np.random.default_rng(seed).normal(scale=0.3, size=(steps, size))))


@pytest.mark.parametrize("seed", range(10))
def test_right_noise_passes_and_another_size_does_not(seed: int) -> None:
    assert flaw_of_noise(noise(seed), 0.3, FALSE_ALARM) == ""
    for factor in (1.05, 1 / 1.05):
        assert "standard deviation" in flaw_of_noise(noise(seed), 0.3 * factor, FALSE_ALARM)


def test_one_percent_is_found_in_six_hundred_thousand_numbers() -> None:
    for seed in range(3):
        many = noise(seed, 10, 60_000)
        assert flaw_of_noise(many, 0.3, FALSE_ALARM) == ""
        for factor in (1.01, 0.99):
            assert "standard deviation" in flaw_of_noise(many, 0.3 * factor, FALSE_ALARM)


def test_flaws_of_noise_of_the_right_size_are_named() -> None:
    right = torch.stack(noise(0))
    twice = right[:, :1000].repeat_interleave(2, dim=1)
    alike = (right + 0.3 * right.roll(1, dims=1)) / (1 + 0.3**2) ** 0.5
    again = (right + 0.3 * right.roll(1, dims=0)) / (1 + 0.3**2) ** 0.5
    uniform = torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, (30, 2000)) * 12**0.5 * 0.3)
    for flawed, words in (
        (twice, "correlated"), (alike, "correlated"), (again, "correlated"), (uniform, "not normally"),
    ):  # fmt: skip
        assert words in flaw_of_noise(list(flawed), 0.3, FALSE_ALARM)


def test_no_noise_and_nan_are_flaws_unless_none_is_claimed() -> None:
    zeros, nans = [torch.zeros(5).double()] * 3, [torch.full((5,), torch.nan).double()] * 3
    assert flaw_of_noise(zeros, 0.0, FALSE_ALARM) == ""
    assert flaw_of_noise(zeros, 0.1, FALSE_ALARM)
    assert flaw_of_noise(nans, 0.1, FALSE_ALARM)
    assert flaw_of_noise(noise(0), 0.0, FALSE_ALARM)


def test_right_noise_is_refused_no_more_often_than_claimed() -> None:
    """At a level at which it can be counted."""
    refused = sum(bool(flaw_of_noise(noise(seed, 4, 300), 0.3, 0.2)) for seed in range(300))
    assert refused <= 0.2 * 300 + 3 * (0.2 * 0.8 * 300) ** 0.5


@pytest.mark.parametrize("rate", [0.02, 0.5, 1.0])
def test_poisson_draws_pass_and_others_do_not(rate: float) -> None:
    for seed in range(20):
        sizes = np.random.default_rng(seed).binomial(500, rate, size=200).tolist()
        assert flaw_of_draws(sizes, 500, rate, FALSE_ALARM) == ""
    assert "claimed are about" in flaw_of_draws(sizes, 500, rate / 2, FALSE_ALARM)
    if rate < 1:
        assert "too little" in flaw_of_draws([round(500 * rate)] * 200, 500, rate, FALSE_ALARM)
        wild = [0, round(1000 * rate)] * 100
        assert "too much" in flaw_of_draws(wild, 500, rate, FALSE_ALARM)


def test_few_steps_of_small_batches_say_nothing_of_their_spread() -> None:
    assert flaw_of_spread([(50, 100, 0.5)] * 4, FALSE_ALARM) == ""
    assert flaw_of_draws([2, 2, 2], 24, 2 / 24, FALSE_ALARM) == ""


def test_updates_with_the_same_noise_are_found() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert flaw_of_pairs(list(rng.normal(size=(40, 3000))), 1e-6) == ""
    shared = rng.normal(size=(40, 3000))
    shared[7] += 0.3 * shared[29]
    assert "updates share noise" in flaw_of_pairs(list(shared), 1e-6)
    assert flaw_of_pairs([shared[0], np.zeros(3000)], 1e-6) == "an update without any noise"
    assert flaw_of_pairs([shared[0]], 1e-6) == ""
