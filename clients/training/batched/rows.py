"""The examples of all clients' current batches as one list of rows, cut into passes with little padding.

Semantics allow any cut: a client's gradient is a sum over its examples, and no example knows the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clients.training.batches import Indices, physical_batches
from clients.training.units import shares
from fedlora.data.examples import Examples

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, slots=True)
class Costs:
    """Limits by which rows are cut into passes.

    Attributes:
        most_tokens: tokens of a pass at most, padding included; a single longer row is a pass of its own.
        of_a_pass: what one pass more costs, as the tokens that could be computed meanwhile.
    """

    most_tokens: int
    of_a_pass: int


CPU = Costs(most_tokens=1024, of_a_pass=20)
"""Activations stay in the cache; a pass costs the reading of all weights from memory."""
ACCELERATOR = Costs(most_tokens=32768, of_a_pass=2048)


@dataclass(frozen=True, slots=True)
class Rows:
    """Examples that are trained on together.

    Attributes:
        examples: their numbers in the data set.
        clients: whose each of them is, by its place in the cohort.
        places: each one's place in its client's own batch.
        lengths: tokens of each.
        units: where units of several examples are private, whose of all units drawn each is; else None.
        shares: the share of each in its unit's mean, float32; None likewise.
    """

    examples: Numbers
    clients: Numbers
    places: Numbers
    lengths: Numbers
    units: Numbers | None = None
    shares: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def among(self, chosen: Numbers) -> Rows:
        """Some of the rows, in the order in which they are asked for."""
        return Rows(
            self.examples[chosen], self.clients[chosen], self.places[chosen], self.lengths[chosen],
            units=None if self.units is None else self.units[chosen],
            shares=None if self.shares is None else self.shares[chosen],
        )  # fmt: skip


def gather(examples: Examples, batches: Sequence[Indices], owners: Sequence[Indices] | None = None) -> Rows:
    """One row for each example of each client's batch, client after client.

    Args:
        examples: the data set.
        batches: of each client.
        owners: which of its client's units each example is of, counted from 0; None where there are none.
    """
    chosen = np.concatenate([np.asarray(batch, dtype=np.int64) for batch in batches])
    sizes = [len(batch) for batch in batches]
    return Rows(
        examples=chosen,
        clients=np.repeat(np.arange(len(batches)), sizes),
        places=np.concatenate([np.arange(size) for size in sizes]),
        lengths=examples.lengths_of(chosen),
        units=None if owners is None else counted_on(owners),
        shares=None if owners is None else np.concatenate([shares(own) for own in owners]),
    )


def counted_on(owners: Sequence[Indices]) -> Numbers:
    """Units numbered within their clients, numbered over all clients.

    >>> counted_on([np.array([0, 0, 1]), np.array([0])]).tolist()
    [0, 0, 1, 2]
    """
    counts = [int(own.max(initial=-1)) + 1 for own in owners]
    starts = np.cumsum([0, *counts[:-1]])
    return np.concatenate([own + start for own, start in zip(owners, starts, strict=True)])


def microbatches(batches: Sequence[Indices], most: int) -> Iterator[list[Indices]]:
    """The clients' batches, in parts of at most ``most`` examples (0: all), the first parts first.

    >>> [[len(part) for part in wave] for wave in microbatches([np.arange(5), np.arange(2)], 2)]
    [[2, 2], [2, 0], [1, 0]]
    """
    parts = [physical_batches(batch, most) for batch in batches]
    for number in range(max(map(len, parts))):
        yield [
            part[number] if number < len(part) else batch[:0]
            for part, batch in zip(parts, batches, strict=True)
        ]


def passes(rows: Rows, costs: Costs, most_rows: int = 0) -> list[Rows]:
    """The rows in groups of similar length, so that padding and the number of passes together cost least.

    Args:
        rows: at least one.
        costs: of a pass and of a token.
        most_rows: rows of a pass at most; 0 means any number.
    """
    order = np.argsort(rows.lengths, kind="stable")
    ends = cheapest_cuts(rows.lengths[order], costs, most_rows)
    starts = [0, *ends[:-1]]
    return [rows.among(np.sort(order[a:b])) for a, b in zip(starts, ends, strict=True)]


def cheapest_cuts(lengths: Numbers, costs: Costs, most_rows: int = 0) -> list[int]:
    """The ends of consecutive groups of sorted lengths whose total cost is least.

    A group of n rows, the longest of l tokens, costs ``n l + of_a_pass``.

    >>> cheapest_cuts(np.array([5, 5, 6, 60]), Costs(most_tokens=1024, of_a_pass=20))
    [3, 4]
    >>> cheapest_cuts(np.array([5, 5, 6, 60]), Costs(most_tokens=1024, of_a_pass=1000))
    [4]
    """
    number = len(lengths)
    best = np.zeros(number + 1)
    begins = np.zeros(number + 1, dtype=np.int64)
    for end in range(1, number + 1):
        longest = int(lengths[end - 1])
        most = max(1, costs.most_tokens // longest)
        first = max(0, end - (min(most, most_rows) if most_rows else most))
        totals = best[first:end] + (end - np.arange(first, end)) * longest
        begins[end] = first + int(np.argmin(totals))
        best[end] = totals.min() + costs.of_a_pass
    ends: list[int] = []
    end = number
    while end > 0:
        ends.append(end)
        end = int(begins[end])
    return ends[::-1]
