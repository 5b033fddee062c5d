"""Single clients in the report and the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.csv
import pytest

from fedlora.server.records import spread
from fedlora.study.analyse.intervals import over_seeds
from fedlora.study.analyse.results import CellResult
from fedlora.study.analyse.summary import summarise
from fedlora.study.report.charts import draw_charts
from fedlora.study.report.report import render, write_report
from tests.study.made_up import result

CLIENTS = {str(k): 0.6 + 0.01 * k for k in range(20)}


def run(name: str, clients: dict[str, float] | None, *, seed: int = 0, **keys: Any) -> CellResult:
    return result(name, seed=seed, label=f"{name}-{seed}", outcome=spread(clients), keys=keys)


def test_each_seed_finds_its_own_worst_clients() -> None:
    first, second = {"0": 0.5, "1": 0.9}, {"0": 0.8, "1": 0.6}
    (row,) = summarise([run("flora", first), run("flora", second, seed=1)])
    assert row.worst_client == over_seeds([0.5, 0.6])
    assert row.accuracy_by_client == pytest.approx({"0": 0.65, "1": 0.75})


def test_clients_stand_in_the_table_the_chart_and_the_csv(tmp_path: Path) -> None:
    runs = [run("flora", CLIENTS), run("fedavg", {**CLIENTS, "7": 0.125})]
    write_report(tmp_path / "report.html", "Clients", runs)
    page = (tmp_path / "report.html").read_text()
    assert page.index("Worst client") < page.index("Worst decile") < page.index("MB up")
    assert ">12.5%<" in page.replace(" ", "")
    assert "fedavg, worst client: 12.5%" in page
    assert "flora, 10th percentile: 61.9%" in page
    first, second = pyarrow.csv.read_csv(tmp_path / "results.csv").to_pylist()
    assert first["accuracy_worst_decile"] == pytest.approx(0.605)
    assert (second["accuracy_worst_client"], second["accuracy client 7"]) == (0.125, 0.125)


def test_the_chart_is_left_out_where_the_domains_say_the_same() -> None:
    four = {str(k): 0.7 for k in range(4)}
    names = [chart.name for chart in draw_charts(summarise([run("flora", four)]))]
    assert "clients" not in names
    assert "domains" in names


def test_without_any_there_are_no_columns_and_the_page_says_why() -> None:
    page = render("None", [run("flora", None)])
    assert "not known where data is not divided by domain" in " ".join(page.split())
    assert "Worst client</button>" not in page
