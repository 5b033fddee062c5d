"""Text that is generated for machines, out of ``templates/``, and the environment of Flower's processes."""

from __future__ import annotations

import os
import string
import sys
from pathlib import Path

import tomli_w

from fedlora.deployment.operator.layout import CONNECTION

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Set in every start script: nothing calls home, nothing is installed, and a process is started for a message
within the poll interval, else 1 s."""
RESTART_SECONDS = 75
"""Before a node may be started again after it died: its lease at the SuperLink (30 s heartbeats, two missed)
has to run out, else the SuperLink refuses it."""
REQUEST_REFUSED = 2
"""Exit code of a node whose settings or data are wrong: starting it again would not help."""


class _Template(string.Template):
    """Placeholders are ``@{name}``, as shells have a use for dollars."""

    delimiter = "@"


def filled(name: str, **values: object) -> str:
    """A template with its placeholders filled in; ``head`` is what all scripts begin with."""
    head = _template("head.sh").substitute(quiet=" ".join(f"{k}={v}" for k, v in QUIET.items())).rstrip()
    return _template(name).substitute(values, head=head)


def _template(name: str) -> _Template:
    return _Template((Path(__file__).parent / "templates" / name).read_text())


def unit(what: str, folder: str, script: str, restart: int) -> str:
    """A systemd unit for a folder copied to ``/opt/fedlora``."""
    return filled(
        "unit.service", what=what, folder=folder, script=script, restart=restart, refused=REQUEST_REFUSED
    )


def node_toml(partition_id: int, data: str, dataset_id: str) -> str:
    """A node's settings, to be edited by its owner; see `clients.node_settings`."""
    values = {"data": data, "dataset_id": dataset_id}
    quoted = {k: tomli_w.dumps({"v": v}).partition("=")[2].strip() for k, v in values.items()}
    return filled("node.toml", partition_id=partition_id, **quoted)


def flower_config(ca: Path, control_port: int) -> str:
    """Flower's ``config.toml`` for the operator, who works on the server."""
    connection = {"address": f"127.0.0.1:{control_port}", "root-certificates": str(ca)}
    return tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}})


def flower_environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment with `QUIET`, a Flower home, and this installation's commands found first.

    Args:
        home: Flower's home directory.
        more: further variables.
    """
    path = os.pathsep.join(filter(None, (str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    return {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": str(home), **more}
