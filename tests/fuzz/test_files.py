"""A spoiled file is refused in one line that names it, or read as what it was; none is ever unpickled."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.harness import fuzz
from tests.fuzz.subjects import SUBJECTS

COUNT = 100
"""Of each subject; `python -m tests.fuzz` makes as many as it is told."""


@pytest.mark.parametrize("name", SUBJECTS)
def test_spoiled_files_are_refused_by_name_or_do_no_harm(name: str, tmp_path: Path, cache: Path) -> None:
    outcomes = fuzz(name, SUBJECTS[name], COUNT, tmp_path)
    assert sum(outcomes.values()) == COUNT
    assert outcomes["refused"] > COUNT // 10, outcomes
