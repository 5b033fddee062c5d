"""Cutting rows into passes: nobody is lost, the cut is the cheapest, and limits hold."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from clients.training.batched.rows import Costs, Rows, cheapest_cuts, gather, microbatches, passes
from tests.clients.cohort.samples import DATA


def cost(lengths: np.ndarray, ends: list[int], costs: Costs) -> int:
    starts = [0, *ends[:-1]]
    return sum((b - a) * int(lengths[b - 1]) + costs.of_a_pass for a, b in zip(starts, ends, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most_rows", [0, 3])
def test_the_cut_is_the_cheapest(seed: int, most_rows: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, 40, 8))
    costs = Costs(most_tokens=int(rng.integers(30, 200)), of_a_pass=int(rng.integers(0, 60)))
    found = cheapest_cuts(lengths, costs, most_rows)
    best = min(
        cost(lengths, [*inner, 8], costs)
        for number in range(8)
        for inner in combinations(range(1, 8), number)
        if allowed(lengths, [*inner, 8], costs, most_rows)
    )
    assert allowed(lengths, found, costs, most_rows)
    assert cost(lengths, found, costs) == best


def allowed(lengths: np.ndarray, ends: list[int], costs: Costs, most_rows: int) -> bool:
    starts = [0, *ends[:-1]]
    return all(
        b - a == 1
        or ((b - a) * lengths[b - 1] <= costs.most_tokens and (not most_rows or b - a <= most_rows))
        for a, b in zip(starts, ends, strict=True)
    )


def test_every_example_is_in_one_pass_with_its_client_and_place() -> None:
    batches = [np.array([5, 3, 9]), np.array([], dtype=np.int64), np.array([9, 30])]
    rows = gather(DATA, batches)
    parts = passes(rows, Costs(most_tokens=12, of_a_pass=1))
    assert len(parts) > 1
    found = [
        (int(c), int(p), int(e), int(n))
        for part in parts
        for c, p, e, n in zip(part.clients, part.places, part.examples, part.lengths, strict=True)
    ]
    wanted = [
        (c, p, int(e), len(DATA.input_ids(int(e))))
        for c, batch in enumerate(batches)
        for p, e in enumerate(batch)
    ]
    assert sorted(found) == wanted


def test_passes_save_padding() -> None:
    lengths = np.array([4, 60, 5, 6, 59, 4])
    rows = Rows(np.arange(6), np.zeros(6, dtype=np.int64), np.arange(6), lengths)
    parts = passes(rows, Costs(most_tokens=1024, of_a_pass=20))
    assert [sorted(part.lengths.tolist()) for part in parts] == [[4, 4, 5, 6], [59, 60]]


def test_waves_keep_the_order_of_physical_batches() -> None:
    batches = [np.arange(5), np.arange(10, 12)]
    found = [[part.tolist() for part in wave] for wave in microbatches(batches, 2)]
    assert found == [[[0, 1], [10, 11]], [[2, 3], []], [[4], []]]
    assert [[len(part) for part in wave] for wave in microbatches(batches, 0)] == [[5, 2]]
