from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.examples import Examples, collate, evaluation_subset

token_lists = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=12)


def examples(rows: list[list[int]], domains: list[int] | None = None) -> Examples:
    return Examples(
        tokens=np.concatenate([np.array(row, dtype=np.int32) for row in rows]),
        offsets=np.cumsum([0, *map(len, rows)]),
        labels=np.arange(len(rows)) % 3,
        domains=np.array(domains or [-1] * len(rows), dtype=np.int32),
    )


@settings(deadline=None)
@given(token_lists, st.data())
def test_a_batch_unpadded_is_the_examples(rows: list[list[int]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    batch = collate(examples(rows), chosen, pad_token_id=7)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (len(chosen), max(len(rows[i]) for i in chosen))
    for row, index in enumerate(chosen):
        assert ids[row][mask[row] == 1].tolist() == rows[index]
        assert mask[row].tolist() == sorted(mask[row].tolist(), reverse=True), "padding is on the right"
        assert set(ids[row][mask[row] == 0].tolist()) <= {7}
    assert batch["labels"].tolist() == [index % 3 for index in chosen]


@pytest.mark.parametrize("none", [[], np.array([], dtype=np.int64)])
def test_an_empty_batch(none: list[int] | np.ndarray) -> None:
    batch = collate(examples([[1, 2]]), none, pad_token_id=0)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (0, 1),
        "attention_mask": (0, 1),
        "labels": (0,),
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_a_batch_is_a_copy() -> None:
    data = examples([[1, 2], [3]])
    batch = collate(data, [0, 1], pad_token_id=0)
    batch["labels"] += 1
    batch["input_ids"] += 1
    assert data.labels.tolist() == [0, 1]
    assert data.tokens.tolist() == [1, 2, 3]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 90))
def test_the_subset_keeps_the_domains_in_proportion(domains: list[int], size: int) -> None:
    data = examples([[1]] * len(domains), domains)
    subset = evaluation_subset(data, size)
    assert len(subset) == min(size, len(domains))
    assert np.all(np.diff(subset) > 0)
    for domain in set(domains):
        wanted = len(subset) * domains.count(domain) / len(domains)
        assert abs(int((data.domains[subset] == domain).sum()) - wanted) <= 2


def test_the_subset_of_unequal_domains() -> None:
    data = examples([[1]] * 400, [0] * 40 + [1] * 360)
    assert np.bincount(data.domains[evaluation_subset(data, 100)]).tolist() == [10, 90]


def test_the_subset_is_fixed_spread_out_and_zero_means_all() -> None:
    data = examples([[1]] * 100)
    assert evaluation_subset(data, 0).tolist() == list(range(100))
    assert np.array_equal(evaluation_subset(data, 20), evaluation_subset(data, 20))
    assert evaluation_subset(data, 20).max() > 50
