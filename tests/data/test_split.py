from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data.split import held_out, linked_rows, normalised

rows = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from("xyz")), min_size=1, max_size=40
)


def test_duplicates_differ_in_case_blanks_and_punctuation_only() -> None:
    assert normalised("Good,  GOOD\tfilm!") == normalised("good good film")
    assert normalised("good film") != normalised("good films")
    assert normalised(":-)") != normalised(":-(")


@settings(deadline=None)
@given(rows)
def test_units_are_the_classes_of_the_transitive_closure(rows: list[tuple[int, int, str]]) -> None:
    units = linked_rows([row[0] for row in rows], [row[1] for row in rows])
    related = np.array([[a[0] == b[0] or a[1] == b[1] for b in rows] for a in rows])
    for _ in rows:
        related = related @ related
    assert np.array_equal(related, units[:, None] == units[None, :])


@settings(deadline=None)
@given(rows, st.floats(0.05, 0.95))
def test_no_unit_is_torn_apart(rows: list[tuple[int, int, str]], fraction: float) -> None:
    units = linked_rows([row[0] for row in rows], [row[1] for row in rows])
    test = held_out(units, [row[2] for row in rows], fraction)
    assert not set(units[test]) & set(units[~test])


@settings(deadline=None)
@given(st.lists(st.sampled_from("xyz"), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_every_stratum_gets_its_share(strata: list[str], fraction: float) -> None:
    test = held_out(np.arange(len(strata)), strata, fraction)
    for stratum in set(strata):
        members = np.array([value == stratum for value in strata])
        assert abs(test[members].sum() - fraction * members.sum()) <= 0.5 + 1e-9


def test_large_units_come_as_near_as_they_can() -> None:
    units = np.repeat([0, 1, 2], [10, 10, 10])
    assert held_out(units, ["a"] * 30, 0.2).sum() == 10  # 6 wanted: 10 is nearer than 0
    assert held_out(units, ["a"] * 30, 0.1).sum() == 0  # 3 wanted: 0 is nearer than 10


def test_the_split_is_fixed() -> None:
    units = np.arange(100)
    first, second = (held_out(units, ["a"] * 100, 0.2) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(np.flatnonzero(first), np.arange(20)), "not simply the first rows"
