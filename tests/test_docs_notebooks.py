"""The notebooks run from top to bottom, each without another's names, and are stored without outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the package nbclient")
nbclient = pytest.importorskip("nbclient", reason="needs the package nbclient")
pytest.importorskip("ipykernel", reason="needs the package ipykernel")
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 240
SHOWN = {
    "first-run": ("accuracy", "did you mean", "rank"),
    "compare-aggregation": ("report.html", "fedavg", "flora", "tabular"),
    "privacy-budget": ("8.0", "epsilon"),
}
"""Notebook -> words among what its cells print and return."""


def carried_out(paths: Iterable[Path], here: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What notebooks print and return, by name.

    They share a process, which imports what is heavy once; each stands in an empty directory and has no names
    at its beginning.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(here / "ipython"))
    book, length = nbformat.v4.new_notebook(), dict[str, int]()
    for path in paths:
        (here / path.stem).mkdir()
        book.cells.append(nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {here / path.stem}"))
        book.cells += nbformat.read(path, as_version=4).cells
        length[path.stem] = len(book.cells)
    nbclient.NotebookClient(book, timeout=SECONDS, resources={"metadata": {"path": str(here)}}).execute()
    ends = zip(length, pairwise([0, *length.values()]), strict=True)
    return {name: shown(book.cells[first:last]) for name, (first, last) in ends}


def shown(cells: list[Any]) -> str:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(str(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs)


@pytest.mark.slow
def test_the_notebooks_run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(SHOWN) == [path.stem for path in NOTEBOOKS]
    printed = carried_out(NOTEBOOKS, tmp_path, monkeypatch)
    for name, words in SHOWN.items():
        for word in words:
            assert word in printed[name], printed[name]


def test_a_cell_that_fails_turns_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(book, tmp_path / "wrong.ipynb")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        carried_out([tmp_path / "wrong.ipynb"], tmp_path, monkeypatch)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_stored(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in book.cells)
