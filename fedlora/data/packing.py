"""Sequence packing: several examples in one row, none of which sees another.

A row has positions that begin anew with each example and no attention mask, which is how transformers knows
packed sequences: it then attends within each example alone (block-diagonal, causal). What fills a row up
is an example of its own that nobody counts. Only padding is saved: batches and losses stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedlora.data.examples import Examples

NOBODY = -1
"""The number of what fills a row up."""


def collate_packed(
    examples: Examples, indices: Sequence[int] | np.ndarray, pad_token_id: int, capacity: int = 0
) -> dict[str, Tensor]:
    """One batch of shape (rows, capacity): input_ids, position_ids, counted and segments, int64; and labels.

    ``segments`` says of each token which of ``indices`` it is of, by its place, `NOBODY` of what fills up;
    ``counted`` whether the loss counts it, never the first of an example, which nothing of it predicts.

    Args:
        examples: texts.
        indices: which of them, at least one.
        pad_token_id: fills a row up.
        capacity: tokens of a row; 0 means as many as the longest example has.
    """
    lengths = [int(length) for length in examples.lengths_of(np.asarray(indices))]
    capacity = capacity or max(lengths)
    rows = first_fit(lengths, capacity)
    shape = (len(rows), capacity)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    positions, counted = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, NOBODY, dtype=np.int64)
    for number, row in enumerate(rows):
        begin = 0
        for place in row:
            end = begin + lengths[place]
            start = int(examples.offsets[indices[place]])
            input_ids[number, begin:end] = examples.tokens[start : start + lengths[place]]
            positions[number, begin:end] = np.arange(lengths[place])
            segments[number, begin:end] = place
            counted[number, begin:end] = (
                1 if examples.counted is None else examples.counted[start : start + lengths[place]]
            )
            counted[number, begin] = 0
            begin = end
        positions[number, begin:] = np.arange(capacity - begin) % max(lengths)  # no more than a model has
    found = {"input_ids": input_ids, "position_ids": positions, "counted": counted, "segments": segments}
    return {name: torch.from_numpy(array) for name, array in found.items()} | {
        "labels": torch.from_numpy(examples.labels[np.asarray(indices, dtype=np.int64)])
    }


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Places of the lengths, packed into rows of a capacity: the longest first, each where it first fits.

    >>> first_fit([2, 6, 3, 4], 6)
    [[1], [3, 0], [2]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        row = next((number for number, free in enumerate(room) if free >= lengths[place]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(place)
        room[row] -= lengths[place]
    return rows
