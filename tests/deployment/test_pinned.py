"""A node runs its own fedlora: shipped code that differs by a letter is neither imported nor answered."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from flwr.common.config import get_project_dir

from fedlora import pinned_client_app as pinned
from fedlora.client_app import app
from fedlora.core.code import code_root, top_packages
from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.submit import _app


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """The app as Flower unpacks it: what it packs of the app that a run ships."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.install import install_from_fab

    with _app(tmp_path) as source:
        bundle = build_fab_from_disk(source)
        return Path(install_from_fab(bundle, tmp_path / "flwr", skip_prompt=True))


def load(directory: Path) -> object:
    return pinned.loader(lambda *_: directory)(default_app_ref="", app_path=None, multi_app=True)(
        "a", "1", "ff" * 32
    )


def test_the_same_code_is_carried_out_by_the_installed_one(shipped: Path) -> None:
    assert pinned.difference(shipped) == ""
    assert load(shipped) is app


def changed(shipped: Path, tmp_path: Path, how: str) -> str:
    """Ways to ship other code; each leaves a mark where it is imported."""
    mark = f"\nopen({str(tmp_path / 'imported')!r}, 'w')\n"
    own = shipped / "fedlora" / "client_app.py"
    if how == "a letter":
        own.write_text(own.read_text() + mark)
        return "fedlora/client_app.py is not the installed one"
    if how == "a file more":
        (shipped / "sitecustomize.py").write_text(mark)
        return "sitecustomize.py is shipped and not installed"
    if how == "a test's name":
        (shipped / "torch_test.py").write_text(mark)
        return "torch_test.py is shipped and not installed"
    if how == "a file less":
        own.unlink()
        return "fedlora/client_app.py is not shipped"
    (shipped / "fedlora" / "errors.py").write_bytes(b"")
    return "fedlora/errors.py is not the installed one"


@pytest.mark.parametrize("how", ["a letter", "a file more", "a test's name", "a file less", "an empty file"])
def test_other_code_is_declined_unread(
    how: str, shipped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    why = changed(shipped, tmp_path, how)
    with caplog.at_level(logging.WARNING, "fedlora"), pytest.raises(RuntimeError) as refused:
        load(shipped)
    assert str(refused.value) == pinned.REFUSED
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"declined the code of app {'ff' * 8}: {why}"
    assert not (tmp_path / "imported").exists()


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


def test_flowers_runner_asks_for_its_loader_where_it_is_replaced() -> None:
    """The name in the module that `main` replaces is the one that the run looks up."""
    from flwr.supernode.runtime import run_clientapp

    assert "get_load_client_app_fn" in run_clientapp.run_clientapp.__code__.co_names
    assert run_clientapp.get_project_dir is get_project_dir
    assert set(top_packages()) <= {path.name for path in code_root().iterdir()}
