"""The report in a real browser: no errors, buttons work, nothing sticks out on a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.study.report.report import write_report
from tests.study.made_up import large, study

webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver")
OF_RUNS = ".chart .series[data-series^=s]"
"""What a run's button hides; levels such as the majority stay."""
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("study") / "report.html"
    write_report(path, "A study", study())
    return path.as_uri()


@pytest.fixture
def page(browser: Any, address: str) -> Any:
    _screen(browser, 1280, "light")
    browser.get_log("performance")
    browser.get(address)
    return browser


def _screen(browser: Any, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


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
    assert len(parts) == 11
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
    _screen(page, 390, "light")
    widths = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths == [390, 390]
    for details in _find(page, "details"):
        page.execute_script("arguments[0].open = true", details)
    assert page.execute_script("return document.documentElement.scrollWidth") == 390
    for chart in _find(page, ".chart svg"):
        assert chart.rect["x"] >= 0
        assert chart.rect["x"] + chart.rect["width"] <= 390


def test_text_in_charts_is_legible_on_a_phone(page: Any) -> None:
    _screen(page, 390, "light")
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
    _screen(browser, 1280, "light")
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
    _screen(browser, 390, "light")
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
    _screen(page, 1280, "dark")
    dark = [
        _style(page, "body", "backgroundColor"),
        _style(page, "body", "color"),
        _style(page, line, "stroke"),
    ]
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert dark[0] == "rgb(22, 24, 27)"
