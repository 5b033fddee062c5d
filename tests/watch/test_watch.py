"""What `fedlora watch` tells: before a run began, while it is written, after its end; and to whom."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlora.cli import cli
from fedlora.watch.metrics import CONTENT_TYPE, metrics
from fedlora.watch.serve import Server
from fedlora.watch.snapshot import RunState, Watcher
from tests.watch.written import add, begin, record


def only(path: Path) -> RunState:
    (run,) = Watcher(path).runs()
    return run


def test_nothing_is_told_of_a_run_before_it_began(tmp_path: Path) -> None:
    assert Watcher(tmp_path / "to-come").runs() == []
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").write_text("")
    assert Watcher(tmp_path).runs() == []
    run = only(begin(tmp_path / "begun"))
    assert (run.name, run.state, run.round, run.rounds) == ("begun", "running", 0, 4)
    assert run.seconds_left is None


def test_a_half_written_line_is_not_there_yet(tmp_path: Path) -> None:
    home, line = begin(tmp_path / "run"), record(2)
    watcher = Watcher(home)
    add(home, record(1) + line[:30])
    (run,) = watcher.runs()
    assert (run.round, run.seconds, run.seconds_left) == (1, 3.0, 9.0)
    add(home, line[30:])
    (run,) = watcher.runs()
    assert (run.round, run.seconds_left, run.accuracies) == (2, 6.0, [(1, 0.6), (2, 0.7)])
    assert (run.bytes_up, run.bytes_down, run.seen) == (2000, 4000, {"0": 2, "1": 2})


def test_a_run_ends_fails_or_is_silent(tmp_path: Path) -> None:
    home = begin(tmp_path / "run")
    add(home, record(1))
    os.utime(home / "rounds.jsonl", (0, 0))
    assert (only(home).state, only(home).seconds_left) == ("silent", None)
    (home / "failed.json").write_text(json.dumps({"reason": "too few clients"}))
    assert (only(home).state, only(home).reason) == ("failed", "too few clients")
    (home / "result.json").write_text("{}")
    assert (only(home).state, only(home).reason) == ("finished", "")


def test_a_study_has_its_runs_and_hides_what_cannot_be_read(tmp_path: Path) -> None:
    for name in ("flora", "fedavg"):
        begin(tmp_path / name, strategy={"name": name})
    begin(tmp_path / "other", rnak=4)
    begin(tmp_path / ".hidden")
    assert [(run.name, run.strategy) for run in Watcher(tmp_path).runs()] == [
        ("fedavg", "fedavg"), ("flora", "flora"),
    ]  # fmt: skip


def test_a_federation_has_its_nodes_and_its_runs(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from fedlora.deployment.operator.create import create

    create(tmp_path / "net", 2, [], port=8000, data=[])
    settings = tmp_path / "net" / "nodes" / "node-1" / "node.toml"
    text = settings.read_text()
    assert "max-epsilon = 0.0" in text
    settings.write_text(text.replace("max-epsilon = 0.0", "max-epsilon = 3.0"))
    sent = {
        "time": "2026-01-02T03:04:05+00:00", "run": "SECRETKEY", "strategy": "flora", "round": 7,
        "asked": "train", "status": "declined", "bytes": 0, "metrics": {}, "epsilon": 1.5, "reason": "no",
    }  # fmt: skip
    journal = settings.parent / "state" / "sent.jsonl"
    journal.parent.mkdir(exist_ok=True)
    journal.write_text(json.dumps(sent) + "\n")
    begin(tmp_path / "net" / "runs" / "first")
    with Server(tmp_path / "net") as server:
        state = server.state()
    first, second = state["nodes"]
    assert (first["name"], first["seen"], first["max_epsilon"]) == ("node-0", "", None)
    assert (second["seen"], second["asked"], second["declined"]) == (sent["time"], "train, round 7", 1)
    assert second["why_declined"] == "no"
    assert (second["epsilon"], second["max_epsilon"]) == (1.5, 3.0)
    assert [run["name"] for run in state["runs"]] == ["runs/first"]
    assert "SECRETKEY" not in json.dumps(state)


def test_metrics_are_in_prometheus_text_format(tmp_path: Path) -> None:
    home = begin(tmp_path / 'a"b', privacy={"mode": "example"})
    add(home, record(1, epsilon=2.5, refused={"1": "late"}))
    lines = metrics(Watcher(tmp_path).runs(), []).splitlines()
    label = r'{run="a\"b",strategy="fedavg"}'
    assert f"fedlora_run_epsilon{label} 2.5" in lines
    assert f"fedlora_run_target_epsilon{label} 8" in lines
    assert f"fedlora_run_refused_total{label} 1" in lines
    assert "# TYPE fedlora_run_refused_total counter" in lines
    assert r'fedlora_run_state{run="a\"b",state="running"} 1' in lines
    add(begin(tmp_path / "numbers"), record(1, accuracy=None, rmse=0.25))
    assert (
        'fedlora_run_rmse{run="numbers",strategy="fedavg"} 0.25'
        in metrics(Watcher(tmp_path).runs(), []).splitlines()
    )


# --- the server --------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "run") as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: Server, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_the_page_its_state_and_the_metrics_are_all_there_is(server: Server) -> None:
    status, headers, page = ask(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert json.loads(ask(server, "/state.json")[2]) == {"runs": [], "nodes": []}
    add(begin(server.watcher.path), record(1, loss=float("nan")))
    assert json.loads(ask(server, "/state.json")[2])["runs"][0]["last"]["loss"] is None
    assert ask(server, "/metrics")[1]["Content-Type"] == CONTENT_TYPE
    for path in ("/config.toml", "/../run/config.toml", "/state.json?x", "/run"):
        assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"])
def test_only_get_is_answered(method: str, server: Server) -> None:
    status, headers, _ = ask(server, "/state.json", method)
    assert status == 501
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:PORT", "127.0.0.1:1", "127.0.0.1", "localhost.x:PORT", ""]
)
def test_another_name_of_this_machine_is_refused(host: str, server: Server) -> None:
    status, _, said = ask(server, "/state.json", Host=host.replace("PORT", str(server.server_port)))
    assert (status, "runs" in said) == (421, False)


def test_it_listens_on_the_loopback_alone(server: Server) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0] == 200


# --- the command -------------------------------------------------------------------------------------


def test_bad_places_and_ports_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said: dict[str, list[Any]] = {
            "is a file, name the directory": [tmp_path / "file"],
            "there is no such directory": [tmp_path / "a" / "b"],
            f"--port {port}: cannot be had": [tmp_path, "--port", port],
            "--port 70000: cannot be had": [tmp_path, "--port", 70000],
        }
        for words, arguments in said.items():
            done = CliRunner().invoke(cli, ["watch", *map(str, arguments)])
            assert (done.exit_code, words in done.stderr) == (2, True), done.stderr
            assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly(how: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from fedlora.cli import main; main()", "watch", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().split()[0]
    with urllib.request.urlopen(f"{address}state.json", timeout=10) as answer:
        assert json.load(answer) == {"runs": [], "nodes": []}
    process.send_signal(how)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "stopped\n", "")


def test_no_network_is_imported_to_look_at_files() -> None:
    """Torch alone takes two seconds, until the first line and again at the end."""
    code = "import sys, fedlora.watch.serve; sys.exit(str({'torch', 'numpy', 'flwr'} & {*sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.stderr == "set()\n"
