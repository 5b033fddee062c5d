"""The notebooks run from top to bottom in a kernel, and are stored without outputs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the package nbclient")
nbclient = pytest.importorskip("nbclient", reason="needs the package nbclient")
pytest.importorskip("ipykernel", reason="needs the package ipykernel")
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 240
BARS = {"first-run": 1, "compare-aggregation": 6, "privacy-budget": 2}
"""Runs in the first cell of each."""
WORDS = {
    "first-run": ("accuracy", "did you mean", "rank"),
    "compare-aggregation": ("report.html", "fedavg", "flora", "tabular"),
    "privacy-budget": ("8.0", "epsilon"),
}
"""What each shows."""


def carried_out(book: Any, here: Path) -> Any:
    """The notebook with its outputs; its kernel stands in ``here`` and finds this tree."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patched.setenv("IPYTHONDIR", str(here / "ipython"))
        client = nbclient.NotebookClient(book, timeout=SECONDS, resources={"metadata": {"path": str(here)}})
        return client.execute()


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Any]:
    """All notebooks, carried out in one kernel, each in a folder of its own and without the others' names."""
    here = tmp_path_factory.mktemp("notebooks")
    read = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
    assert read.keys() == BARS.keys()
    cells = []
    for name, book in read.items():
        (here / name).mkdir()
        cells.append(
            nbformat.v4.new_code_cell(f"%reset -f\nimport os; os.chdir({str(here / name)!r}); del os")
        )
        cells += book.cells
    carried_out(nbformat.v4.new_notebook(cells=cells), here)
    return read


def shown(book: Any) -> str:
    """What its cells print and return, as text."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "\n".join(str(o.get("text", o.get("data", {}).get("text/plain", ""))) for o in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", BARS)
def test_a_notebook_runs(name: str, books: dict[str, Any]) -> None:
    printed = shown(books[name])
    for word in WORDS[name]:
        assert word in printed, printed
    check_first_cell(books[name], bars=BARS[name])


def check_first_cell(book: Any, bars: int) -> None:
    """One bar for each run, as it is at its end, and little else."""
    outputs = next(cell.outputs for cell in book.cells if cell.cell_type == "code")
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    found = [page for page in pages if "<progress" in page]
    assert len(found) == bars, found
    for page in found:
        done, total = re.findall(r'(?:value|max)="(\d+)"', page)
        assert done == total
        assert " left" not in page
        assert re.search(r"</progress> \d/\d accuracy 0\.\d", page)
    assert len(outputs) <= 2 * bars + 4
    told = "".join(output.get("text", "") for output in outputs)
    assert "Warning" not in told
    assert "\r" not in told
    assert len(told.splitlines()) < 10


def test_a_cell_that_fails_turns_red(tmp_path: Path) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        carried_out(book, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_stored(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in book.cells)
