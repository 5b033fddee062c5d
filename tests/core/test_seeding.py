"""Named streams: the same name gives the same bits, another name tells nothing about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.core.seeding import derive, stream, torch_stream

NAMES = st.lists(st.one_of(st.integers(-5, 10**9), st.sampled_from(["client", "init-a", "x"])), max_size=4)


@given(seed=st.integers(0, 2**70), names=NAMES)
def test_a_stream_is_a_63_bit_function_of_its_name(seed: int, names: list[str | int]) -> None:
    value = derive(seed, *names)
    assert 0 <= value < 2**63
    assert value == derive(seed, *names)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, "a", "b"), (1, "ab")),
        ((1, 2, 3), (1, 23)),
        ((12, 3), (1, 23)),
        ((1, "a", 2), (1, 2, "a")),
        ((1, "client", 1, 12), (1, "client", 11, 2)),
        ((1,), (1, "")),
    ],
    ids=str,
)
def test_where_names_are_cut_and_how_they_are_ordered_counts(
    one: tuple[int, str | int], other: tuple[int, str | int]
) -> None:
    assert derive(*one) != derive(*other)


def test_no_two_of_many_streams_coincide() -> None:
    seeds = {derive(s, "client", r, k) for s in range(3) for r in range(30) for k in range(100)}
    assert len(seeds) == 3 * 30 * 100


def test_the_numbers_are_pinned() -> None:
    """Published runs name a seed; these values may never change."""
    assert derive(0) == 3456079177858693020
    assert derive(7, "client", 3, 11) == 4531049482339973712
    assert stream(0, "sampling", 1).integers(0, 1000, 4).tolist() == [443, 755, 929, 418]
    drawn = torch.randint(0, 1000, (4,), generator=torch_stream(0, "init-a", "q"))
    assert drawn.tolist() == [424, 121, 797, 488]


def test_draws_elsewhere_do_not_matter() -> None:
    expected = stream(1, "a").normal(size=3), torch.randn(3, generator=torch_stream(1, "a"))
    stream(1, "b").normal(size=100)
    np.random.default_rng(0)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = stream(1, "a").normal(size=3), torch.randn(3, generator=torch_stream(1, "a"))
    assert np.array_equal(expected[0], again[0])
    assert torch.equal(expected[1], again[1])


def test_neighbouring_streams_are_uncorrelated() -> None:
    """200 neighbouring clients, 1000 draws each: no correlation beyond chance, none equal."""
    draws = np.stack([stream(0, "client", 1, k).normal(size=1000) for k in range(200)])
    correlation = np.corrcoef(draws) - np.eye(200)
    assert float(np.abs(correlation).max()) < 6 / np.sqrt(1000)
    assert abs(float(draws.mean())) < 5 / np.sqrt(draws.size)


def test_the_global_generators_are_left_alone() -> None:
    with torch.random.fork_rng():
        before = torch.random.get_rng_state()
        stream(1, "a").normal(size=3)
        torch.randn(3, generator=torch_stream(1, "a"))
        assert torch.equal(torch.random.get_rng_state(), before)
