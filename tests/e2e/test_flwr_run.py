"""The unchanged app under ``flwr run``: the run's status is what counts, never the exit code."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedlora
from fedlora.server.directory import RunDirectory

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def flower(tmp_path: Path, cache: Path) -> Iterator[dict[str, str]]:
    """An environment with its own Flower home and ports; the SuperLink it starts is stopped again."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",  # Flower's Ray would knock at one that died on this machine, for minutes
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
    }
    yield environment
    subprocess.run(["pkill", "-f", f"flower-superlink.*{tmp_path}"], check=False)
    for line in subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines():
        if "flower-superlink" in line and environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] in line:
            os.kill(int(line.split()[0]), 15)


@pytest.mark.slow
def test_flwr_run_gives_the_adapter_of_fedlora_run(flower: dict[str, str], tmp_path: Path) -> None:
    config = (ROOT / "experiments" / "tiny.toml").read_text()
    under_flwr, theirs = tmp_path / "flwr-out", tmp_path / "theirs.toml"
    theirs.write_text(f'output-dir = "{under_flwr}"\n{config}')
    app = tmp_path / "fedlora"
    for package in ("fedlora", "strategies", "clients"):
        shutil.copytree(ROOT / package, app / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, app / file)
    subprocess.run(
        ["flwr", "run", ".", "--federation-config", "num-supernodes=4 client-resources-num-cpus=1",
         "--run-config", str(theirs)],
        cwd=app, env=flower, check=True, timeout=240,
    )  # fmt: skip
    assert wait_for_status(flower, app) == "finished:completed"
    fedlora.run(ROOT / "experiments" / "tiny.toml", tmp_path / "ours", engine="in-process")
    written = "adapter/adapter_model.safetensors"
    assert (under_flwr / written).read_bytes() == (tmp_path / "ours" / written).read_bytes()
    assert len(RunDirectory(under_flwr, resume=True).rounds()) == 2


def wait_for_status(environment: dict[str, str], app: Path, seconds: float = 300) -> str:
    deadline = time.monotonic() + seconds
    status = "unknown"
    while time.monotonic() < deadline:
        listed = subprocess.run(
            ["flwr", "ls", "--format", "json"], cwd=app, env=environment, capture_output=True, text=True
        )
        runs = json.loads(listed.stdout)["runs"] if listed.returncode == 0 else []
        status = runs[0]["status"] if runs else status
        if status.startswith("finished"):
            return status
        time.sleep(2)
    return status
