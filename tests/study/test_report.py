"""The report's file: complete, self-contained, escaped, the same bytes every time."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest

from fedlora.errors import ConfigError
from fedlora.study.analyse.results import CellResult
from fedlora.study.analyse.summary import summarise
from fedlora.study.report.charts import draw_charts
from fedlora.study.report.report import render, write_report
from tests.study.made_up import result, study

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Collects ids, attributes and text, and refuses tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


@pytest.fixture(scope="module")
def html() -> str:
    return render("A study", study())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_nothing_is_fetched(page: Page, html: str) -> None:
    links = page.values("src") + page.values("href")
    folders = [f"{run.label}/" for run in study()]
    assert [link for link in links if not link.startswith(("#", "data:,"))] == folders
    assert not re.search(r"@import|url\((?!#)|https?://", html)
    assert "default-src 'none'" in html


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    named = page.values("aria-labelledby")
    used = [value[1:] for value in page.values("href") if value.startswith("#")]
    clipped = re.findall(r"url\(#([^)]+)\)", " ".join(page.values("clip-path")))
    assert named
    assert used
    assert clipped
    assert set(named + used + clipped) <= set(page.ids)


def test_every_button_moves_something_in_the_charts(page: Page) -> None:
    series = set(page.values("data-series"))
    assert set(page.values("data-toggle")) == {f"s{i}" for i in range(11)}
    assert set(page.values("data-toggle")) <= series


def test_each_marker_says_its_run_and_value(page: Page) -> None:
    assert "lora-fair, tweets: 88.9%" in page.text
    assert any(re.fullmatch(r"fedavg, round 3: \d\d\.\d%", t) for t in page.text)
    assert any(re.fullmatch(r"flora, \d+\.\d+ MB: \d\d\.\d%", t) for t in page.text)
    assert "head-only, round 1: at most 10⁻⁹" in page.text
    assert "fedavg-private, round 10: epsilon 7.94" in page.text


def test_details_name_differences_refusals_and_epsilons(html: str) -> None:
    assert "<code>train.batch-size = 64</code>" in html
    assert html.count("the update holds &lt;b&gt;NaN&lt;/b&gt;") == 10
    assert re.search(r"<tr><th scope=\"row\">ffa-private</th><td>3</td><td>7\.85", html)
    assert "learning-rate = 0.005" in html


def test_what_others_wrote_is_escaped_everywhere() -> None:
    evil = "<script>$x_1$</script>"
    outcome = {"accuracy_by_domain": {evil: 0.8}, "labels": [evil]}
    html = render(evil, [result("flora", outcome=outcome, record={"refused": {"0": evil}})])
    assert evil not in html
    assert html.count("<script>") == 1
    assert html.count("&lt;script&gt;$x_1$") >= 6


def test_claims_stand_on_the_first_screen_and_in_a_table_of_their_own(tmp_path: Path) -> None:
    gains = {"base": 0.0, "fedsvd": 0.012}
    runs = [
        result(name, accuracy=0.7 + gain + 0.001 * (seed % 3) * (name == "fedsvd"), seed=seed,
               keys={"strategy.name": "fedavg"})
        for seed in range(10) for name, gain in gains.items()
    ]  # fmt: skip
    write_report(tmp_path / "report.html", "Claims", runs, "fedsvd:base")
    page = (tmp_path / "report.html").read_text()
    said = "Declared comparisons: 1, decided: 1 (fedsvd against base: better, +1.3 points)"
    assert said in page[: page.index("<main>")]
    assert "10 of 10" in page[page.index("<main>") :]
    (line,) = pyarrow.csv.read_csv(tmp_path / "comparisons.csv").to_pylist()
    assert (line["method"], line["seeds"], line["verdict"]) == ("fedsvd", 10, "better")
    assert line["p_holm"] == pytest.approx(2 / 1024)
    table = pyarrow.parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [(r["method"], r["seed"], r["accuracy"]) for r in table] == [
        (r.method, r.seed, r.result["accuracy"]) for r in runs
    ]
    assert pyarrow.csv.read_csv(tmp_path / "results.csv").num_rows == 20


def test_same_runs_same_bytes_and_small(tmp_path: Path) -> None:
    runs = study((0, 1))
    write_report(tmp_path / "a.html", "A study", runs)
    write_report(tmp_path / "b.html", "A study", runs)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.html").stat().st_size < 400_000


def test_ten_long_runs_stay_below_a_megabyte() -> None:
    runs = [result(f"run-{i}", "variant", num_rounds=200) for i in range(10)]
    assert len(render("Long", runs).encode()) < 1_000_000


def test_colours_are_variables_so_that_dark_mode_can_change_them(page: Page) -> None:
    styles = [value for tag, name, value in page.attributes if name == "style"]
    assert styles
    assert not [value for value in styles if "#" in value or "font-family" in value]


def test_charts_without_data_are_left_out(page: Page) -> None:
    charts = [name for name in page.ids if name.startswith("chart-")]
    assert charts == [
        "chart-overview",
        "chart-accuracy",
        "chart-traffic",
        "chart-gap",
        "chart-cosine",
        "chart-effective-rank",
        "chart-epsilon",
        "chart-trade-off",
        "chart-domains",
    ]
    bare = result(
        "flora",
        record={"accuracy": None, "gap": None, "cosine": None, "effective_rank": None, "examples": None},
        outcome={"accuracy_by_domain": {}},
    )
    assert draw_charts(summarise([bare])) == []
    assert "<h2" in render("Bare", [bare])


@pytest.mark.parametrize(
    "damaged",
    [
        {"record": {"loss": float("nan"), "gap": float("nan"), "bytes_up": 0, "bytes_down": 0}},
        {"num_rounds": 1},
        {"outcome": {"loss": float("nan"), "epsilon_by_client": {}, "labels": []}},
        {"accuracy": 1.0},
        {"accuracy": 0.0},
    ],
    ids=["nothing finite, nothing sent", "one round", "no loss", "all right", "all wrong"],
)
def test_odd_runs_have_a_report_too(damaged: dict[str, object]) -> None:
    Page(render("Odd", [result("flora", **damaged)]))  # type: ignore[arg-type]


def test_the_table_has_differences_what_needs_no_training_and_no_domains(html: str) -> None:
    table = html[html.index('class="sortable"') : html.index("</table>")]
    assert re.search(r'data-value="-0\.012\d*">\N{MINUS SIGN}1\.2 <small>\N{MINUS SIGN}4\.5 to \+2\.1', table)
    assert re.search(r">highest</td>", table)
    assert re.search(
        r'majority baseline <small>untrained</small></th>\s*<td class="number" data-value="0.529">', table
    )
    assert "amazon" not in table
    domains = html[html.index('id="chart-domains"') :]
    assert "<td>83.7%</td>" in domains[: domains.index("</figure>")]


def test_a_gap_of_nothing_is_interpreted_where_a_run_loses_all_the_same(html: str) -> None:
    assert "ffa, head-only and fedsvd: no gap, and yet behind." in html
    assert "yet behind" not in render("One", [result("flora")])


def test_only_references_have_a_report_too() -> None:
    Page(render("References", [result("centralised", "reference")]))


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        write_report(tmp_path / "report.html", "Nothing", [])
    assert not list(tmp_path.iterdir())


def test_the_way_to_an_accuracy_is_told_in_megabytes_and_simulated_time() -> None:
    runs = [
        timed(result("fedavg", seed=seed), hours)
        for seed, hours in ((1, (1.0, 2.0, 4.0)), (2, (2.0, 5.0, 6.0)))
    ]
    (row,) = summarise(runs)
    reached = [next(i for i, r in enumerate(run.rounds) if r["accuracy"] >= 0.5) for run in runs]
    seconds = [run.rounds[i]["virtual_seconds"] for run, i in zip(runs, reached, strict=True)]
    sent = [
        sum(r["bytes_up"] + r["bytes_down"] for r in run.rounds[: i + 1])
        for run, i in zip(runs, reached, strict=True)
    ]
    assert row.until(0.5) == (sum(seconds) / 2, sum(sent) / 2)
    assert row.until(0.99) is None
    text = Page(render("Time", runs, target=0.5)).text
    assert {"MB to 50.0%", "Time to 50.0%", "Simulated time", "Accuracy over simulated time"} <= set(text)
    assert "never" in Page(render("Time", runs, target=0.99)).text
    assert not {"MB to 50.0%", "Time to 50.0%"} & set(Page(render("Time", runs)).text)


def timed(run: CellResult, hours: tuple[float, ...]) -> CellResult:
    accuracies = (0.3, 0.5, 0.6) if run.seed == 1 else (0.5, 0.4, 0.7)
    rounds = [
        {**run.rounds[0], "round": n, "virtual_seconds": 3600 * hour, "accuracy": accuracy}
        for n, (hour, accuracy) in enumerate(zip(hours, accuracies, strict=True), start=1)
    ]
    return replace(run, rounds=rounds)
