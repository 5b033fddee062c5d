"""The page of all studies says what their files and kept cells say."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from experiments import overview
from experiments.overview import NOT_RUN, README, STUDIES, progress, rewritten
from experiments.publish import read
from experiments.tables import PUBLISHED


@pytest.fixture(autouse=True, scope="module")
def each_file_is_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for name in ("read", "planned"):
            patched.setattr(overview, name, cache(getattr(overview, name)))
        yield


def test_the_page_is_up_to_date() -> None:
    assert rewritten(README.read_text()) == README.read_text(), "run python -m experiments.overview"


def test_what_drifted_is_rewritten() -> None:
    page = README.read_text()
    assert rewritten(page.replace(STUDIES[0].claim, "something else")) == page


def test_what_was_not_run_says_so_and_what_says_so_was_not_run() -> None:
    for study in STUDIES:
        done, total = progress(study.name)
        assert 0 <= done <= total
        assert (study.found == NOT_RUN) == (done == 0 and not (PUBLISHED / study.name).exists())


def test_no_kept_cell_is_unknown_to_its_study() -> None:
    for study in STUDIES:
        assert progress(study.name)[0] == len(read(PUBLISHED / study.name))
