"""Requests of the operator to a running SuperLink, through Flower's own command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedlora.core.files import write_atomic
from fedlora.deployment.operator.layout import CONNECTION, Layout, NodeEntry
from fedlora.deployment.operator.running import control_port
from fedlora.deployment.operator.scripts import flower_config, flower_environment
from fedlora.errors import RunFailed

REGISTERED = "in use"
"""What Flower says of a key that it knows already: "Public key already in use"."""
AT_ONCE = 4
SECONDS = 120.0


def register(layout: Layout) -> None:
    """Make the SuperLink know the keys of all nodes; those that it knows stay as they are.

    Raises:
        RunFailed: it does not answer, or refuses one.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda entry: _register(layout, entry), layout.nodes))


def node_states(layout: Layout) -> dict[str, int]:
    """Number of registered nodes in each of Flower's states (``online``, ``offline``, ``registered``).

    Raises:
        RunFailed: the SuperLink does not answer.
    """
    states: dict[str, int] = {}
    for node in flwr(layout, "supernode", "list", CONNECTION, "--format", "json")["nodes"]:
        states[node["status"]] = states.get(node["status"], 0) + 1
    return states


def run_status(layout: Layout, run_id: str) -> tuple[str, str]:
    """A run's status (``running``, ``finished:completed``, ..) and what Flower says about it.

    Raises:
        RunFailed: the SuperLink does not answer, or does not know the run.
    """
    runs = flwr(layout, "ls", CONNECTION, "--run-id", run_id, "--format", "json")["runs"]
    if not runs:
        raise RunFailed(f"run {run_id}: the SuperLink does not know it")
    return str(runs[0]["status"]), str(runs[0].get("status-details") or "")


def flwr(layout: Layout, *arguments: str) -> dict[str, Any]:
    """The JSON that one of Flower's commands prints.

    Raises:
        RunFailed: the command failed.
    """
    done = subprocess.run(
        flwr_command(*arguments),
        env=operator_environment(layout),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    answer = _json_in(done.stdout)
    if done.returncode != 0 or not answer.get("success", True):
        said = answer.get("error-message") or done.stderr.strip() or done.stdout.strip()
        reason = _last_paragraph(said) if answer else _last_line(said)
        raise RunFailed(f"flwr {' '.join(arguments[:2])}: {reason}")
    return answer


def operator_environment(layout: Layout) -> dict[str, str]:
    """For Flower's commands, which find this federation's SuperLink, wherever the directory lies now."""
    config = layout.flower_home / "config.toml"
    wanted = flower_config(layout.server / "ca.crt", control_port(layout))
    if not config.exists() or config.read_text() != wanted:
        write_atomic(config, wanted)
    return flower_environment(layout.flower_home)


def flwr_command(*arguments: str) -> Sequence[str]:
    """Flower's command line of this installation."""
    beside = Path(sys.executable).with_name("flwr")
    return [str(beside) if beside.exists() else (shutil.which("flwr") or "flwr"), *arguments]


def _register(layout: Layout, entry: NodeEntry) -> None:
    key = str(layout.public_key(entry))
    try:
        flwr(layout, "supernode", "register", key, CONNECTION, "--name", entry.name, "--format", "json")
    except RunFailed as error:
        if REGISTERED not in str(error):
            raise


def _json_in(text: str) -> dict[str, Any]:
    """The JSON object in a command's output, whatever stands around it; empty if there is none."""
    begin, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[begin : end + 1]) if begin >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _last_paragraph(text: str) -> str:
    r"""The reason that Flower gives after telling what it does, as one line.

    >>> _last_paragraph("Using SuperLink: x\n Displaying..\n\nIt is unavailable.\nCheck it.\n")
    'It is unavailable. Check it.'
    """
    return " ".join(text.strip().rpartition("\n\n")[2].split())


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
