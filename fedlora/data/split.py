"""A held-out share in which nothing reappears that was trained on; it never depends on a run's seed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence

import numpy as np
import pyarrow as pa

from fedlora.core.seeding import stream
from fedlora.data.columns import PICTURE, TEXTS
from fedlora.errors import ConfigError

_WORD = re.compile(r"\w+")
PARAGRAPH = "\n\n"
"""Between two paragraphs."""


def normalised(text: str) -> str:
    """The words of a text in lower case with single blanks: what makes two texts duplicates.

    >>> normalised("Good,  GOOD film!") == normalised("good good film")
    True
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall(folded)) or folded.strip()


def linked_rows(*keys: Sequence[Hashable]) -> np.ndarray:
    """For every row the number of its unit, shape (rows,): rows that share any key are one unit.

    Sharing is transitive: two authors who wrote the same sentence become one unit.

    >>> linked_rows(["ann", "ann", "bob", "cy"], ["hi", "yes", "yes", "no"]).tolist()
    [0, 0, 0, 1]
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = np.arange(len(keys[0]))
    first = []
    for key in keys:
        seen: dict[Hashable, int] = {}
        first.append(np.array([seen.setdefault(value, row) for row, value in enumerate(key)], dtype=np.int64))
    ends = (np.tile(rows, len(keys)), np.concatenate(first))
    graph = coo_array((np.ones(len(ends[0]), dtype=np.int8), ends), shape=(len(rows), len(rows)))
    units: np.ndarray = connected_components(graph, directed=False)[1]
    return units


def held_out(units: np.ndarray, strata: Sequence[Hashable], fraction: float) -> np.ndarray:
    """Mask of the test rows, booleans of shape (rows,): whole units, the fraction of each stratum.

    A unit belongs to the stratum of its first row. Units come in a fixed shuffled order; one that
    would overshoot its stratum's share is passed over, except for the smallest of those at the end
    if that brings the stratum nearer to its share.
    """
    _, first, inverse, sizes = np.unique(units, return_index=True, return_inverse=True, return_counts=True)
    by_stratum: dict[Hashable, list[int]] = {}
    for unit, row in enumerate(first):
        by_stratum.setdefault(strata[int(row)], []).append(unit)
    chosen = np.zeros(len(first), dtype=bool)
    for stratum, members in by_stratum.items():
        order = stream(0, "test-split", str(stratum)).permutation(members)
        chosen[_fill(order, sizes, fraction)] = True
    test: np.ndarray = chosen[inverse]
    return test


def _fill(order: np.ndarray, sizes: np.ndarray, fraction: float) -> list[int]:
    room = fraction * int(sizes[order].sum())
    chosen: list[int] = []
    passed: list[int] = []
    for unit in order.tolist():
        fits = sizes[unit] <= room
        (chosen if fits else passed).append(unit)
        room -= int(sizes[unit]) if fits else 0
    smallest = min(passed, key=lambda unit: int(sizes[unit]), default=None)
    if smallest is not None and sizes[smallest] < 2 * room:
        chosen.append(smallest)
    return chosen


def last_part(text: str, fraction: float) -> tuple[str, str]:
    r"""A text cut between two paragraphs, where about that share of its characters is left.

    >>> last_part("One.\n\nTwo.\n\nThree.", 0.3)
    ('One.\n\nTwo.', 'Three.')
    """
    place = text.rfind(PARAGRAPH, 0, round(len(text) * (1 - fraction)) + len(PARAGRAPH))
    return ("", text) if place < 0 else (text[:place], text[place + len(PARAGRAPH) :])


def split_table(table: pa.Table, fraction: float, key: str) -> tuple[pa.Table, pa.Table]:
    """Rows to train on and rows held out, linked rows never apart; the same for every seed.

    Raises:
        ConfigError: there is nothing to hold out, or nothing left.
    """
    groups = [table["group"].to_pylist()] if "group" in table.column_names else []
    strata = table["domain"].to_pylist() if "domain" in table.column_names else [""] * len(table)
    test = held_out(linked_rows(_contents(table), *groups), strata, fraction)
    if test.all() or not test.any():
        raise ConfigError(
            f"{key} = {fraction}: {len(table)} examples cannot be split by group and duplicates"
        )
    return table.take(np.flatnonzero(~test)), table.take(np.flatnonzero(test))


def _contents(table: pa.Table) -> list[str] | list[bytes]:
    """Key by which two rows are one example: the words of their texts, or the pixels of their picture."""
    if PICTURE in table.column_names:
        pixels: list[bytes] = table[PICTURE].to_pylist()
        return pixels
    texts = [table[name].to_pylist() for name in TEXTS if name in table.column_names]
    return ["\n".join(map(normalised, row)) for row in zip(*texts, strict=True)]


def split_texts(table: pa.Table, fraction: float, key: str) -> tuple[pa.Table, pa.Table]:
    """Each text but its last part, and the last parts: what is held out comes after all that is trained on.

    Raises:
        ConfigError: a text that cannot be cut.
    """
    cut = [last_part(text, fraction) for text in table["text"].to_pylist()]
    if not all(before and after for before, after in cut):
        raise ConfigError(f"{key} = {fraction}: a text cannot be cut there, between two paragraphs")
    place = table.column_names.index("text")
    before, after = (
        table.set_column(place, "text", pa.array(texts, pa.large_string()))
        for texts in zip(*cut, strict=True)
    )
    return before, after
