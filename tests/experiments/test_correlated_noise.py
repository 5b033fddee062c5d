"""The table of correlated noise is made of the kept figures, and a cell comes out as it is kept."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.correlated_noise import RESULTS, cells, run, table

DOCS = Path(__file__).parent.parent.parent / "docs" / "privacy.md"


def test_the_documented_table_shows_what_is_kept() -> None:
    found = json.loads(RESULTS.read_text())
    assert [(c["arm"], c["epsilon"], c["server"], c["seed"]) for c in found] == list(cells())
    text = (
        DOCS.read_text()
        .partition("<!-- correlated-noise -->\n")[2]
        .partition("\n<!-- /correlated-noise -->")[0]
    )
    assert text.strip() == table(found).strip()


def test_a_kept_cell_comes_out_again() -> None:
    """To half a point: the last bits differ from processor to processor."""
    kept = {(c["arm"], c["epsilon"], c["server"], c["seed"]): c for c in json.loads(RESULTS.read_text())}
    again = run("banded 10", 1.0, "fedavgm", 1)
    same = kept["banded 10", 1.0, "fedavgm", 1]
    assert (again["noise"], again["asked_most"]) == (same["noise"], same["asked_most"]) == (8.213, 10)
    assert abs(again["accuracy"] - same["accuracy"]) < 0.005
