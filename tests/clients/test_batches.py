"""What each step sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.training.batches import load_batch, num_steps, poisson_batches, shuffled_batches
from fedlora.config import TrainConfig
from fedlora.errors import ConfigError
from tests.clients.samples import examples


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), batch_size=st.integers(1, 12), epochs=st.integers(1, 3), seed=st.integers(0, 9))
def test_each_pass_sees_every_example_once(n: int, batch_size: int, epochs: int, seed: int) -> None:
    indices = np.arange(100, 100 + n)
    steps = num_steps(TrainConfig(batch_size=batch_size, local_epochs=epochs), n, 99)
    drawn = list(shuffled_batches(indices, batch_size, steps, np.random.default_rng(seed)))
    assert len(drawn) == steps
    assert all(1 <= len(batch) <= batch_size for batch in drawn)
    for batches in np.array_split(np.arange(steps), epochs):
        assert sorted(np.concatenate([drawn[i] for i in batches])) == list(indices)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
def test_as_many_batches_as_steps(steps: int) -> None:
    rng = np.random.default_rng(0)
    assert len(list(shuffled_batches(np.arange(5), 2, steps, rng))) == steps
    assert len(list(poisson_batches(np.arange(5), 0.1, steps, rng))) == steps


def test_passes_are_shuffled_anew() -> None:
    first, second = shuffled_batches(np.arange(50), 50, 2, np.random.default_rng(0))
    assert list(first) != list(second)
    assert list(first) != sorted(first)


def test_poisson_draws_each_example_on_its_own_with_the_rate() -> None:
    n, rate, steps = 40, 0.25, 2000
    drawn = list(poisson_batches(np.arange(n), rate, steps, np.random.default_rng(0)))
    times = np.bincount(np.concatenate(drawn), minlength=n) / steps
    np.testing.assert_allclose(times, rate, atol=5 * (rate * (1 - rate) / steps) ** 0.5)
    sizes = np.array([len(batch) for batch in drawn])
    assert sizes.var() == pytest.approx(n * rate * (1 - rate), rel=0.15)


def test_steps_or_epochs() -> None:
    assert num_steps(TrainConfig(batch_size=8), 3, 11) == 11
    assert num_steps(TrainConfig(batch_size=8, local_epochs=2), 17, 11) == 6
    with pytest.raises(ConfigError, match="no training example"):
        num_steps(TrainConfig(), 0, 1)


def test_a_batch_is_on_the_device() -> None:
    batch = load_batch(examples(), np.array([2, 0]), 0, torch.device("cpu"))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["labels"].tolist() == examples().labels[[2, 0]].tolist()
