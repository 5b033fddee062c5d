"""A node runs its own fedlora: shipped code that differs by a letter is neither imported nor answered."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest

from fedlora.client_app import app
from fedlora.core.code import code_root, top_packages
from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.submit import _app
from fedlora.pinned_client_app import message as pinned


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The app as Flower packs what a run ships."""
    from flwr.cli.build import build_fab_from_disk

    with _app(tmp_path_factory.mktemp("near")) as source:
        return bytes(build_fab_from_disk(source))


def load(bundle: bytes) -> object:
    pinned.in_place_of_unpacking(bundle, skip_prompt=True)
    return pinned.in_place_of_loading(default_app_ref="", app_path=None, multi_app=True)("a", "1", "ff" * 32)


def test_the_same_code_is_carried_out_by_the_installed_one(shipped: bytes) -> None:
    assert pinned.difference(shipped) == ""
    assert load(shipped) is app


def rewritten(bundle: bytes, change: Callable[[dict[str, bytes]], object]) -> bytes:
    """The bundle with other files."""
    with ZipFile(BytesIO(bundle)) as before:
        files = {name: before.read(name) for name in before.namelist()}
    change(files)
    target = BytesIO()
    with ZipFile(target, "w") as after:
        for name, content in files.items():
            after.writestr(name, content)
    return target.getvalue()


OWN = "fedlora/client_app.py"


def with_file(name: str, make: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The bundle with one file that is made of what it was, of nothing where it is new."""
    return lambda bundle: rewritten(bundle, lambda files: files.update({name: make(files.get(name, b""))}))


def twice(bundle: bytes) -> bytes:
    """Two files of one name, of which readers of zip files take the one or the other."""
    target = BytesIO(bundle)
    with ZipFile(target, "a") as after, pytest.warns(UserWarning, match="Duplicate"):
        after.writestr(OWN, "x = 1")
    return target.getvalue()


OTHERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a letter": (with_file(OWN, lambda own: own + b" "), f"{OWN} is not the installed one"),
    "another letter": (
        with_file(OWN, lambda own: own.replace(b"app", b"apq", 1)),
        f"{OWN} is not the installed one",
    ),
    "an empty file": (
        with_file("fedlora/errors.py", lambda _: b""),
        "fedlora/errors.py is not the installed one",
    ),
    "a file more": (
        with_file("sitecustomize.py", lambda own: own),
        "'sitecustomize.py' is shipped and not installed",
    ),
    "a test's name": (
        with_file("torch_test.py", lambda own: own),
        "'torch_test.py' is shipped and not installed",
    ),
    "a way out": (
        with_file("../../a\nb.py", lambda own: own),
        "'../../a\\nb.py' is shipped and not installed",
    ),
    "a file less": (lambda b: rewritten(b, lambda files: files.pop(OWN)), f"{OWN} is not shipped"),
    "two of a name": (twice, f"{OWN} is not the installed one"),
    "huge": (with_file(OWN, lambda own: own + b" " * 10**8), f"{OWN} is not the installed one"),
    "nothing": (lambda b: b"", "it is no bundle that can be read (BadZipFile)"),
    "half of it": (lambda b: b[: len(b) // 2], "it is no bundle that can be read (BadZipFile)"),
    "no bundle": (lambda b: b"x" * 1000, "it is no bundle that can be read (BadZipFile)"),
}


@pytest.mark.parametrize("how", OTHERS)
def test_other_code_is_declined_unread(how: str, shipped: bytes, caplog: pytest.LogCaptureFixture) -> None:
    make, why = OTHERS[how]
    bundle = make(shipped)
    with caplog.at_level(logging.WARNING, "fedlora"), pytest.raises(RuntimeError) as refused:
        load(bundle)
    assert str(refused.value) == pinned.REFUSED
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"declined the code of app {hashlib.sha256(bundle).hexdigest()[:16]}: {why}"
    assert "\n" not in line


def test_a_file_that_does_not_open_to_what_it_promises_is_declined(shipped: bytes) -> None:
    """Bytes turned anywhere in the bundle: no other code is taken for the installed, and nothing raises."""
    packed = BytesIO()
    with ZipFile(BytesIO(shipped)) as before, ZipFile(packed, "w", ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    shipped = packed.getvalue()
    rng = np.random.default_rng(0)
    for _ in range(200):
        spoilt = bytearray(shipped)
        for place in rng.integers(0, len(spoilt), 3):
            spoilt[place] ^= int(rng.integers(1, 256))
        why = pinned.difference(bytes(spoilt))
        if not why:
            with ZipFile(BytesIO(bytes(spoilt))) as taken:
                for info in taken.infolist():
                    if info.filename.endswith(".py"):
                        assert taken.read(info) == (code_root() / info.filename).read_bytes()


def test_a_new_node_starts_this_command_before_flowers(tmp_path: Path) -> None:
    """By the script's own search path, and it takes Flower's arguments."""
    create(tmp_path / "fed", 1)
    node = tmp_path / "fed" / "nodes" / "node-0"
    assert 'export PATH="$here/bin:$PATH"' in (node / "start.sh").read_text()
    command = node / "bin" / "flwr-clientapp"
    found = shutil.which("flwr-clientapp", path=f"{command.parent}:{Path(sys.executable).parent}")
    assert found == str(command)
    environment = {
        "PATH": f"{command.parent}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPROFILEIMPORTTIME": "1",
    }
    answer = subprocess.run([command, "--help"], env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "--runtime-api-address" in answer.stdout
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert "flwr.supernode.runtime.run_clientapp" in imported
    assert not imported & {"torch", "uvicorn", "sqlalchemy"}, "there is a process for every message"
    assert find_spec(pinned.SUPERNODE) is not None, "Flower has another module of this name"


def test_flowers_runner_asks_for_what_is_replaced() -> None:
    """The names in the module that `main` replaces are those that the run looks up."""
    from flwr.cli.install import install_from_fab
    from flwr.supernode.runtime import run_clientapp

    assert {pinned.UNPACKS, pinned.LOADER} <= set(run_clientapp.run_clientapp.__code__.co_names)
    assert run_clientapp.install_from_fab is install_from_fab
    assert set(top_packages()) <= {path.name for path in code_root().iterdir()}
