"""The list of wrong formulas is up to date: `python -m tests.mutants` finds each line that it changes."""

from __future__ import annotations

from tests.mutants.__main__ import ROOT, load


def test_every_line_to_change_is_there_once_and_so_are_its_tests() -> None:
    for mutant in load():
        assert (ROOT / mutant.file).read_text().count(mutant.find) == 1, mutant
        assert mutant.find != mutant.replace, mutant
        assert all((ROOT / tests).exists() for tests in mutant.tests), mutant
