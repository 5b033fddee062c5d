"""The report in a real browser: no errors, buttons work, nothing sticks out on a phone."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from fedlora.study.report.report import write_report
from tests.browser import a_browser, needs_browser, screen, sideways
from tests.study.made_up import large, study

pytest.importorskip("selenium", reason="needs the package selenium")
pytestmark = needs_browser
OF_RUNS = ".chart .series[data-series^=s]"
"""What a run's button hides; levels such as the majority stay."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with a_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("study") / "report.html"
    write_report(path, "A study", study())
    return path.as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Any:
    screen(browser, 1280, "light")
    browser.get_log("performance")
    browser.get(address)
    return browser


def _find(page: Any, selector: str) -> Any:
    return page.find_elements("css selector", selector)


def _style(page: Any, selector: str, name: str) -> str:
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return str(page.execute_script(script, selector, name))


def test_it_loads_without_a_word_on_the_console(page: Any) -> None:
    assert page.get_log("browser") == []
    assert page.title == "A study"
    assert _find(page, ".sortable tbody th")[0].text == "fedavg\nstrategy"


def test_the_browser_asks_for_nothing_but_the_file(page: Any, address: str) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [address]


def test_a_button_hides_and_shows_its_run_in_all_charts(page: Any) -> None:
    button = _find(page, "[data-toggle=s2]")[0]
    parts = _find(page, ".series[data-series=s2]")
    others = _find(page, ".series[data-series=s3]")
    assert button.text == "flora"
    assert button.get_attribute("aria-pressed") == "true"
    assert len(parts) == 13
    assert all(part.is_displayed() for part in parts)
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not any(part.is_displayed() for part in parts)
    assert all(part.is_displayed() for part in others)
    button.send_keys(" ")
    assert button.get_attribute("aria-pressed") == "true"
    assert all(part.is_displayed() for part in parts)


def test_a_hidden_run_takes_no_marker_of_another_with_it(page: Any) -> None:
    """Markers are defined once and used often; what is used must still be drawn."""
    _find(page, "[data-toggle=s0]")[0].click()
    for marker in _find(page, ".series[data-series=s8] use"):
        assert marker.size["width"] > 0


def test_all_runs_hide_and_come_back(page: Any) -> None:
    (everything,) = _find(page, "[data-all]")
    assert everything.text == "Hide all"
    everything.click()
    assert everything.text == "Show all"
    assert not any(part.is_displayed() for part in _find(page, OF_RUNS))
    _find(page, "[data-toggle=s2]")[0].click()
    assert all(part.is_displayed() for part in _find(page, ".charts .series[data-series=s2]"))
    everything.click()
    assert {b.get_attribute("aria-pressed") for b in _find(page, "[data-toggle]")} == {"true"}


def _column(page: Any, number: int) -> list[str]:
    return [cell.text.split("\n")[0] for cell in _find(page, f".sortable tbody tr > :nth-child({number})")]


def test_the_table_sorts_by_number_and_by_name(page: Any) -> None:
    names, accuracy = _find(page, ".sortable thead th")[:2]
    before = _column(page, 1)
    accuracy.find_element("css selector", "button").click()
    shown = [float(text.rstrip("%")) for text in _column(page, 2)]
    assert shown == sorted(shown, reverse=True)
    assert accuracy.get_attribute("aria-sort") == "descending"
    accuracy.find_element("css selector", "button").click()
    assert accuracy.get_attribute("aria-sort") == "ascending"
    assert _column(page, 1)[0] == "fedsvd"
    names.find_element("css selector", "button").click()
    assert _column(page, 1) == sorted(before)
    assert accuracy.get_attribute("aria-sort") is None
    assert names.get_attribute("aria-sort") == "ascending"


def test_missing_numbers_stay_last_in_both_directions(page: Any) -> None:
    header = next(th for th in _find(page, ".sortable thead th") if th.text.startswith("Epsilon"))
    number = _find(page, ".sortable thead th").index(header) + 1
    for _ in range(2):
        header.find_element("css selector", "button").click()
        assert _column(page, number) == ["7.94"] * 3 + ["\u2013"] * 9


def test_nothing_sticks_out_on_a_phone(page: Any) -> None:
    screen(page, 390, "light")
    widths = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths == [390, 390]
    for details in _find(page, "details"):
        page.execute_script("arguments[0].open = true", details)
    assert page.execute_script("return document.documentElement.scrollWidth") == 390
    for chart in _find(page, ".chart svg"):
        assert chart.rect["x"] >= 0
        assert chart.rect["x"] + chart.rect["width"] <= 390


def test_text_in_charts_is_legible_on_a_phone(page: Any) -> None:
    screen(page, 390, "light")
    heights = [text.rect["height"] for text in _find(page, ".chart svg text") if not _turned(text)]
    assert min(heights) >= 9


OVERLAP = """
const names = [...document.querySelectorAll(arguments[0] + " [data-series] text")];
const drawn = [...document.querySelectorAll(arguments[0] + " [data-series] :is(use, path)")];
const hits = names.flatMap(name => drawn.filter(part => {
  const [a, b] = [name.getBoundingClientRect(), part.getBoundingClientRect()];
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}));
return [names.length, hits.length];
"""


@pytest.mark.parametrize("chart", ["accuracy", "traffic", "epsilon"])
def test_no_name_of_a_level_hides_a_marker_a_line_or_a_band(page: Any, chart: str) -> None:
    names, hits = page.execute_script(OVERLAP, f"#chart-{chart}")
    assert names >= 1
    assert hits == 0


@pytest.fixture(scope="module")
def large_page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of five hundred runs, opened."""
    path: Path = tmp_path_factory.mktemp("large") / "report.html"
    write_report(path, "Five hundred runs", large(), "*:method-0")
    screen(browser, 1280, "light")
    browser.get_log("browser")
    browser.get(path.as_uri())
    return path


def test_five_hundred_runs_are_less_than_five_megabytes_and_load_in_peace(
    browser: Any, large_page: Path
) -> None:
    assert large_page.stat().st_size < 5_000_000
    assert browser.get_log("browser") == []
    assert len(_find(browser, ".sortable tbody tr")) == 51


def test_a_large_page_still_sorts_and_hides(browser: Any, large_page: Path) -> None:
    accuracy = _find(browser, ".sortable thead th")[1]
    accuracy.find_element("css selector", "button").click()
    shown = [float(text.rstrip("%")) for text in _column(browser, 2)]
    assert shown == sorted(shown, reverse=True)
    _find(browser, "[data-all]")[0].click()
    assert not any(part.is_displayed() for part in _find(browser, f"#chart-accuracy{OF_RUNS}"))
    _find(browser, "[data-all]")[0].click()


def test_the_legend_of_many_runs_leaves_room_for_the_charts(browser: Any, large_page: Path) -> None:
    assert _find(browser, ".legend")[0].rect["height"] < 844 / 4


def test_long_names_leave_room_for_the_numbers_on_a_phone(browser: Any, large_page: Path) -> None:
    screen(browser, 390, "light")
    for name in (".sortable tbody th", "#claims ~ .scroll tbody th"):
        assert _find(browser, name)[0].rect["width"] < 390 / 2
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390


def _turned(text: Any) -> bool:
    return "rotate(-90" in (text.get_attribute("transform") or "")


def test_dark_mode_turns_paper_ink_and_series(page: Any) -> None:
    line = "#chart-accuracy [data-series=s0] path"
    light = [
        _style(page, "body", "backgroundColor"),
        _style(page, "body", "color"),
        _style(page, line, "stroke"),
    ]
    screen(page, 1280, "dark")
    dark = [
        _style(page, "body", "backgroundColor"),
        _style(page, "body", "color"),
        _style(page, line, "stroke"),
    ]
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert dark[0] == "rgb(22, 24, 27)"


# --- columns, copies, pictures -----------------------------------------------------------------------


def _columns(page: Any) -> list[str]:
    return [th.text for th in _find(page, "#all-runs thead th") if th.is_displayed()]


@pytest.mark.parametrize("width", [1280, 1136, 390])
def test_only_columns_that_fit_are_shown_and_a_reader_has_the_others(page: Any, width: int) -> None:
    screen(page, width, "light")
    page.refresh()
    room = "const room = document.querySelector('#all-runs').parentElement; "
    assert page.execute_script(f"{room} return room.scrollWidth - room.clientWidth") == 0
    assert _columns(page)[:2] == ["Run", "Accuracy"]
    assert sideways(page) <= 0
    boxes = _find(page, ".columns input")
    assert len(boxes) == len(_find(page, "#all-runs thead th")) - 1
    assert sum(box.is_selected() for box in boxes) == len(_columns(page)) - 1
    if width > 1000:
        return
    assert len(_columns(page)) < len(boxes)
    summary = next(s for s in _find(page, ".tools summary") if s.text.startswith("Columns ("))
    summary.click()
    (epsilon,) = [label for label in _find(page, ".columns label") if label.text == "Epsilon"]
    epsilon.click()
    assert _columns(page)[-1] == "Epsilon"
    assert sideways(page) == 0


def _as(page: Any, form: str) -> str:
    found = page.execute_script("return tableText(document.querySelector('#all-runs'), arguments[0])", form)
    return str(found)


def test_a_table_is_copied_as_it_is_shown(page: Any) -> None:
    rows = list(csv.reader(_as(page, "csv").splitlines()))
    assert rows[0] == _columns(page)
    assert rows[1][:2] == ["fedavg (strategy)", "81.7% (80.1 to 83.2%)"]
    assert len({len(row) for row in rows}) == 1
    markdown = _as(page, "Markdown").splitlines()
    assert markdown[1].startswith("| --- | ---: |")
    assert len(markdown) == len(rows) + 1
    latex = _as(page, "LaTeX")
    assert r"fedavg (strategy) & 81.7\% (80.1 to 83.2\%) &" in latex
    assert latex.count(r"\\") == len(rows)
    button = next(b for b in _find(page, "#runs ~ .tools button") if b.text == "csv")
    page.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite"]})
    button.click()
    page.execute_script("window.focus()")
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, e => done(String(e)))"
    assert page.execute_async_script(read) == _as(page, "csv")
    assert button.text == "csv: copied"


HOSTILE = """
const table = document.createElement("table");
table.innerHTML = "<tr><th>a</th></tr><tr><td></td></tr>";
table.rows[1].cells[0].textContent = arguments[0];
return tableText(table, arguments[1]);
"""


def test_signs_of_the_forms_are_escaped(page: Any) -> None:
    text = 'a,"b"|c_d%\\e$'
    assert next(csv.reader([page.execute_script(HOSTILE, text, "csv").splitlines()[1]])) == [text]
    assert r"\|c" in page.execute_script(HOSTILE, text, "Markdown")
    assert r"|c\_d\%\textbackslash{}e\$ \\" in page.execute_script(HOSTILE, text, "LaTeX")


def test_a_chart_is_saved_as_svg_and_png_with_its_legend(page: Any, tmp_path: Path) -> None:
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    page.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    _find(page, "[data-toggle=s1]")[0].click()
    for button in _find(page, "#chart-accuracy > .tools button"):
        button.click()
    deadline = time.monotonic() + 20
    while not all((tmp_path / f"accuracy.{ending}").exists() for ending in ("svg", "png")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    text = (tmp_path / "accuracy.svg").read_text()
    assert "var(" not in text
    names = [
        "".join(e.itertext()) for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert "flora" in names
    assert "ffa" not in names
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.width == 920
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50


def test_a_picture_is_on_the_first_screen(page: Any) -> None:
    (picture,) = _find(page, "#chart-overview svg")
    assert picture.rect["y"] + picture.rect["height"] < 844
    page.set_window_size(1280, 844)
    assert "lora-fair" in [text.text for text in _find(page, "#chart-overview svg text")]


def test_what_differs_is_marked_and_folders_are_linked(page: Any) -> None:
    marked = {mark.get_attribute("textContent") for mark in _find(page, "#differing mark")}
    assert marked == {"0", "0.005", "example", "64"}
    links = [link.get_attribute("href") for link in _find(page, ".run a")]
    assert links[0].endswith("/fedavg/")
    assert len(links) == len(study())
