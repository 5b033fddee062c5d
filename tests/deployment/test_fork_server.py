"""The fork server of a node: a process for each message, one server for a node, no door but its socket."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedlora.deployment.node import fork_client as asking
from fedlora.deployment.node.fork_client import LOG, OWNER, SOCKET, TAKEN
from fedlora.deployment.node.sockets import connected
from fedlora.pinned_client_app.fork_server import OTHER_CODE, stamp

pytestmark = pytest.mark.slow

SECONDS = 60.0


@pytest.fixture
def owner(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """The process with which a fork server ends, in the place of Flower's."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setenv(OWNER, str(process.pid))
    yield process
    process.kill()
    process.wait()


def servers(home: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if {str(home), "fedlora.pinned_client_app.fork_server"} <= {*(process.info["cmdline"] or [])}
        and process.status() != psutil.STATUS_ZOMBIE
    ]


def until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError(what)


def listens(home: Path) -> bool:
    try:
        connected(home / SOCKET).close()
    except OSError:
        return False
    return True


@pytest.fixture
def home(tmp_path: Path, owner: subprocess.Popen[bytes]) -> Path:
    """A node's directory with a fork server that listens."""
    asking.start(tmp_path)
    until("it does not listen", lambda: listens(tmp_path))
    return tmp_path


def answered(home: Path, body: bytes, streams: tuple[int, ...] = (1, 2)) -> bytes:
    with connected(home / SOCKET) as connection:
        connection.settimeout(SECONDS)
        sent = socket.send_fds(connection, [body], streams)
        connection.sendall(body[sent:])
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(100)


def request(arguments: list[str], **more: str) -> bytes:
    environment = {**os.environ, **more}
    return json.dumps(
        {"arguments": arguments, "environment": environment, "directory": str(Path.cwd())}
    ).encode()


def test_a_process_of_its_own_for_each_message_writes_where_the_message_would(home: Path) -> None:
    """With the message's arguments and streams; the server goes on, and keeps nothing of it."""
    (server,) = servers(home)
    before = server.num_fds()
    for _ in range(3):
        with (home / "out").open("wb") as out:
            assert answered(home, request(["--help"]), (out.fileno(), out.fileno())) == TAKEN
            until("it wrote nothing", lambda: b"--runtime-api-address" in (home / "out").read_bytes())
    until("a process stays", lambda: not server.children())
    assert server.num_fds() == before
    assert servers(home) == [server]
    assert (home / LOG).read_text() == ""


def test_an_environment_of_many_parts_arrives_whole(home: Path) -> None:
    with (home / "out").open("wb") as out:
        body = request(["--help"], LONG="x" * 900_000)
        assert answered(home, body, (out.fileno(), out.fileno())) == TAKEN
        until("it wrote nothing", lambda: b"--runtime-api-address" in (home / "out").read_bytes())


def test_who_sends_half_and_waits_holds_up_nobody(home: Path) -> None:
    with connected(home / SOCKET) as half:
        socket.send_fds(half, [b"{"], (1, 2))
        assert answered(home, request(["--help"]), (1, 2)) == TAKEN


def test_a_message_that_waits_for_a_node_that_is_gone_ends_with_it(
    home: Path, owner: subprocess.Popen[bytes]
) -> None:
    """Flower's own process would ask for ever."""
    (server,) = servers(home)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        asked = ["--insecure", "--token", "t", "--runtime-api-address", address]
        assert answered(home, request(asked)) == TAKEN
        accepted, _ = silent.accept()
        with accepted:
            (message,) = server.children()
            owner.kill()
            owner.wait()
            until("the message stays", lambda: not message.is_running())
            until("the server stays", lambda: not servers(home))


def test_only_the_nodes_user_can_open_its_socket(home: Path) -> None:
    assert stat.S_IMODE((home / SOCKET).stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_it_ends_with_its_owner(home: Path, owner: subprocess.Popen[bytes]) -> None:
    owner.kill()
    owner.wait()
    until("it stays", lambda: not servers(home))
    assert not (home / SOCKET).exists()
    assert not asking.handed_over(home, ["--help"])


@pytest.mark.parametrize(
    ("body", "streams"),
    [(b"{", (1, 2)), (b"[]", (1, 2)), (b"{}", (1, 2)), (request([]), (1,)), (b"\xff" * 2000, (1, 2))],
)
def test_rubbish_is_dropped_and_the_next_message_is_served(
    body: bytes, streams: tuple[int, ...], home: Path
) -> None:
    (server,) = servers(home)
    before = server.num_fds()
    assert answered(home, body, streams) == b""
    assert (home / LOG).read_text().startswith("a request was dropped: ")
    with (home / "out").open("wb") as out:
        assert answered(home, request(["--help"]), (out.fileno(), out.fileno())) == TAKEN
    until("a process stays", lambda: not server.children())
    assert server.num_fds() == before


def test_a_second_one_takes_the_firsts_place(home: Path) -> None:
    (first,) = servers(home)
    command = [*first.cmdline()]
    subprocess.Popen(command, start_new_session=True)
    until("the first stays", lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE)
    assert listens(home)
    (second,) = servers(home)
    assert second.pid != first.pid


def test_code_that_has_changed_is_not_forked(tmp_path: Path, owner: subprocess.Popen[bytes]) -> None:
    """It ends, so that the next message starts from what is on the disk."""
    program = (
        "import itertools, pathlib, psutil, sys; from fedlora.pinned_client_app import fork_server as served;"
        "numbers = itertools.count(); served.stamp = lambda: frozenset({next(numbers)});"
        "served.serve(pathlib.Path(sys.argv[1]), psutil.Process(int(sys.argv[2])))"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(owner.pid)])
    until("it does not listen", lambda: (tmp_path / SOCKET).exists())
    assert answered(tmp_path, request(["--help"])) == OTHER_CODE
    assert process.wait(SECONDS) == 0
    assert not (tmp_path / SOCKET).exists()


def test_the_stamp_is_of_every_file_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fedlora.pinned_client_app import fork_server

    monkeypatch.setattr(fork_server, "code_root", lambda: tmp_path)
    monkeypatch.setattr(fork_server, "top_packages", lambda: ("own",))
    file = tmp_path / "own" / "deep" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n")
    first = stamp()
    assert len(first) == 1
    os.utime(file, ns=(1, 1))
    second = stamp()
    (file.parent / "b.py").write_text("")
    assert len({first, second, stamp()}) == 3


def test_without_a_server_or_a_node_the_message_is_carried_out_here(tmp_path: Path) -> None:
    """As it is by a node's first message, and where Flower's process is not a node's."""
    for state in (str(tmp_path), ""):
        command = [sys.executable, "-m", "fedlora.pinned_client_app", "--help"]
        environment = {**os.environ, "FEDLORA_STATE_DIR": state}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        assert "--runtime-api-address" in done.stdout
    assert not (tmp_path / SOCKET).exists()


def test_whose_messages_are_started_by_flower_alone_gets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that runs what is shipped has no command that sets the owner."""
    monkeypatch.delenv(OWNER, raising=False)
    asking.start(tmp_path)
    assert [*tmp_path.iterdir()] == []
