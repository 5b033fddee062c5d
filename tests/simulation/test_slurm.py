"""The script for Slurm, with stand-ins for Slurm's commands and Ray's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs_commands import ROOT

STAND_INS = {
    "scontrol": 'printf "node-a\\nnode-b\\n"',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "hostname": 'echo "10.0.0.1 fe80::1 "',
    "ray": 'echo "ray $*" >> "$SAID"; test "$1" != status -o -e "$SAID.up" || { touch "$SAID.up"; exit 1; }',
    "fedlora": 'for word in fedlora "$@"; do echo "<$word>" >> "$SAID"; done; exit "$CODE"',
    "sleep": "exit 0",
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("code", [0, 1])
def test_it_starts_ray_waits_for_it_and_runs_one_study(code: int, tmp_path: Path) -> None:
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    done = subprocess.run(
        ["bash", str(ROOT / "docs" / "fedlora.slurm"), "my run/c.toml", "/shared/a b"],
        env=os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(said), "CODE": str(code),
            "SLURM_JOB_NODELIST": "node-[a-b]",
        },
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, "")
    lines = said.read_text().splitlines()
    assert {
        "ray start --head --node-ip-address 10.0.0.1 --port 6379 --block",
        "ray start --address 10.0.0.1:6379 --block",
    } < set(lines)
    assert lines.count("ray status --address 10.0.0.1:6379") == 2, "it must wait until Ray answers"
    study = "fedlora compare", "my run/c.toml", "--out", "/shared/a b", "--resume", "--set"
    words = [line[1:-1] for line in lines if line.startswith("<")]
    assert words == [*study[0].split(), *study[1:], "engine.address=10.0.0.1:6379"]
