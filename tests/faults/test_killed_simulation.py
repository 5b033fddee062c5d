"""``kill -9`` of a whole simulated run, then ``--resume``: nothing lost, the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

BIN = Path(sys.executable).parent
CONFIG = """
seed = 3
num-server-rounds = 12
fraction-train = 0.5
model = {{ name = "tiny" }}
data = {{ name = "synthetic", evaluate-examples = 60 }}
lora = {{ rank = 4 }}
train = {{ local-steps = 3 }}
strategy = {{ name = "{strategy}" }}
engine = {{ num-actors = 1 }}
{more}
"""
PRIVATE = 'privacy = { mode = "example", target-epsilon = 8.0 }'


def start(config: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [str(BIN / "fedlora"), "run", str(config), "--out", str(out), *more]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def rounds(out: Path) -> int:
    path = out / "rounds.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_round(process: subprocess.Popen[bytes], out: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while rounds(out) < number:
        assert process.poll() is None, (out.parent / f"{out.name}.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill_after(process: subprocess.Popen[bytes], out: Path, round_number: int, delay: float) -> None:
    """SIGKILL of the driver and all its processes, some time after a round was written."""
    wait_for_round(process, out, round_number)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(out: Path) -> tuple[dict[str, bytes], list[dict[str, object]], dict[str, float]]:
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    kept = ("round", "accuracy", "loss", "bytes_up", "bytes_down", "participants", "epsilon_by_client")
    result = json.loads((out / "result.json").read_text())
    bits = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return bits, [{key: record[key] for key in kept} for record in records], result["epsilon_by_client"]


@pytest.mark.deployed
@pytest.mark.parametrize(
    ("strategy", "more"),
    [("flora", ""), ("fedsvd", ""), ("fedavg", PRIVATE)],
    ids=["flora", "fedsvd", "private"],
)
def test_a_killed_run_goes_on_where_it_was(strategy: str, more: str, tmp_path: Path, cache: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(strategy=strategy, more=more))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(config, undisturbed).wait(300) == 0, (tmp_path / "undisturbed.log").read_text()
    kill_after(start(config, killed), killed, 1, 0.0)
    kill_after(start(config, killed, "--resume"), killed, 3, 0.15)
    assert not (killed / "result.json").exists()
    assert start(config, killed, "--resume").wait(300) == 0, (tmp_path / "killed.log").read_text()
    assert outcome(killed) == outcome(undisturbed)


@pytest.mark.deployed
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_round_leaves_nothing_behind(
    how: signal.Signals, tmp_path: Path, cache: Path
) -> None:
    config, out, shared = tmp_path / "run.toml", tmp_path / "out", Path("/dev/shm")
    config.write_text(CONFIG.format(strategy="flora", more=""))
    before = set(shared.iterdir())
    process = start(config, out, "--set", "num-server-rounds=400")
    wait_for_round(process, out, 2)
    began = {each.pid for each in psutil.Process(process.pid).children(recursive=True)}
    assert len(began) > 2
    process.send_signal(how)
    assert process.wait(60) == 1
    said = (tmp_path / "out.log").read_text()
    assert said.endswith("interrupted; what was written stays, go on with --resume\n")
    assert "Traceback" not in said
    assert "***" not in said
    deadline = time.monotonic() + 20
    while left := [pid for pid in began if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert {each for each in shared.iterdir() if each not in before and "plasma" in each.name} == set()
    done = rounds(out)
    assert start(config, out, "--resume", "--set", f"num-server-rounds={done + 1}").wait(300) == 0
