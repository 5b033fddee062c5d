"""The live page in a real browser: before, while and after a run; on a phone; in the dark."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.watch.serve import Server
from tests.browser import a_browser, needs_browser, screen, sideways
from tests.watch.written import add, begin, record

pytest.importorskip("selenium", reason="needs the package selenium")
pytestmark = needs_browser
NAMES = "return [...document.querySelectorAll('#nodes td')].map((cell) => cell.dataset.name)"
OUTSIDE = """
const right = document.querySelector("#nodes .scroll").getBoundingClientRect().right + 1;
const cells = [...document.querySelectorAll("#nodes tbody th, #nodes tbody td")];
return cells.filter((cell) => cell.getBoundingClientRect().right > right).length;
"""
"""Cells of nodes that can only be seen after scrolling sideways."""
REASON = "<img src=x onerror=alert(1)> & a-long-word-without-a-space-" + "x" * 80


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with a_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def until(there: Callable[[], Any]) -> None:
    """Wait for what the page shows at its next look, or the one after."""
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline, "the page did not change"
        time.sleep(0.1)


def text(browser: Any) -> str:
    return str(browser.execute_script("return document.body.innerText"))


def test_a_run_is_followed_from_before_its_begin_to_after_its_end(browser: Any, tmp_path: Path) -> None:
    home = tmp_path / "<b>study"
    with Server(home) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        screen(browser, 1280)
        browser.get_log("browser")
        browser.get(server.address)
        until(lambda: "No run has begun here yet." in text(browser))
        run = begin(home / "flora")
        add(run, record(1) + record(2, refused={"1": REASON}) + record(3)[:20])
        until(lambda: "round 2 of 4" in text(browser))
        assert "left about 6 s" in text(browser)
        assert "accuracy 70.0%" in text(browser)
        assert browser.execute_script("return document.querySelector('progress').value") == 2
        browser.find_element("css selector", "summary").click()
        assert f"round 2, partition 1: {REASON}" in text(browser)
        for width, scheme in ((1280, "light"), (390, "light"), (390, "dark")):
            screen(browser, width, scheme)
            assert sideways(browser) == 0
        add(run, record(3)[20:] + record(4))
        (run / "result.json").write_text(json.dumps({}))
        until(lambda: "finished" in text(browser))
        assert browser.execute_script("return document.querySelector('details').open")
        assert "round 4 of 4" in text(browser)
        assert browser.title == "<b>study"
        assert not browser.find_elements("css selector", "img, b")
        assert browser.get_log("browser") == []
        server.shutdown()
    until(lambda: "has ended or does not answer" in text(browser))


def test_nodes_of_a_federation_have_a_table(browser: Any, tmp_path: Path) -> None:
    server_file = tmp_path / "net" / "server" / "federation.toml"
    server_file.parent.mkdir(parents=True)
    nodes = [f'[[nodes]]\nname = "node-{k}"\npartition-id = {k}\nfingerprint = "f{k}"' for k in range(3)]
    server_file.write_text("\n".join(['host = "a"', "port = 1", "control-port = 2", *nodes]))
    add(begin(tmp_path / "net" / "first"), record(1))
    with Server(tmp_path / "net") as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        screen(browser, 390, "dark")
        browser.get(server.address)
        until(lambda: browser.find_elements("css selector", "#nodes tbody tr"))
        rows = [row.text for row in browser.find_elements("css selector", "#nodes tbody tr")]
        assert ["round 1 of first" in row for row in rows] == [True, True, False]
        assert sideways(browser) == 0
        assert browser.execute_script(NAMES).count("Declined") == 3
        assert browser.execute_script(OUTSIDE) == 0
        server.shutdown()
