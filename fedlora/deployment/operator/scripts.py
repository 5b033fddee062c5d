"""What is generated for machines: start scripts, systemd units, Flower's configuration, a node's settings."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from fedlora.deployment.operator.environment import QUIET
from fedlora.deployment.operator.layout import CONNECTION

RESTART_SECONDS = 75
"""Before a node may be started again after it died: its lease at the SuperLink (30 s heartbeats, two missed)
has to run out, else the SuperLink refuses it."""
REQUEST_REFUSED = 2
"""Exit code of a node whose settings or data are wrong: starting it again would not help."""

_HEAD = """#!/bin/sh
# {what}; see docs/deployment.md. Flower and fedlora must be on PATH.
set -eu
umask 077
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
export FLWR_HOME="$here/flwr"
export {quiet}
"""

_SUPERLINK = """export FEDLORA_FEDERATION="$here/federation.toml"
exec flower-superlink --host 127.0.0.1 --port "${{FEDLORA_CONTROL_PORT:-{control_port}}}" \\
    --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \\
    --enable-supernode-auth --disable-runtime-dependency-installation --database superlink.db
"""

_GATE = """exec fedlora federation gate "$here" --host "${{FEDLORA_GATE_HOST:-0.0.0.0}}" \\
    --port "${{FEDLORA_GATE_PORT:-{port}}}" --control-port "${{FEDLORA_CONTROL_PORT:-{control_port}}}"
"""

_NODE = """export FEDLORA_STATE_DIR="$here/state"
fedlora federation check "$here"
exec flower-supernode --superlink "${{FEDLORA_SUPERLINK:-{address}}}" --root-certificates ca.crt \\
    --auth-supernode-private-key key --node-config node.toml \\
    --host 127.0.0.1 --port "${{FEDLORA_NODE_PORT:-9094}}"
"""

_UNIT = """[Unit]
Description={what}
After=network-online.target
Wants=network-online.target

[Service]
User=fedlora
Environment=PATH=/opt/fedlora/venv/bin:/usr/local/bin:/usr/bin:/bin
ExecStart=/opt/fedlora/{folder}/{script}
Restart=always
RestartSec={restart}
RestartPreventExitStatus={refused}
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=full

[Install]
WantedBy=multi-user.target
"""

_NODE_TOML = """# What the owner of this machine decides. Nothing of it is sent except the partition id.
partition-id = {partition_id}

# The examples: a jsonl, csv or parquet file, a dataset directory, or one of pictures (LABEL/*.png); absolute.
# Empty: this partition of the dataset that the run's configuration names.
data = {data}
text-column = "text"
# Read where the run is on pictures.
image-column = "image"
# "" for texts or conversations that have no label.
label-column = "label"
# Share of them that is kept from training, to measure a personal model on.
test-fraction = 0.0

# Your name for this data, under which the privacy spent on it is written down. Other data needs another name.
dataset-id = {dataset_id}
# More than this is never spent on it, whatever a run asks for; 0 means: as the run says.
max-epsilon = 0.0
max-delta = 1e-5
# 0: the number of your examples is public. Otherwise a public number that stands for it and is not below it;
# runs must then say privacy.neighboring-relation = "add_or_remove_one".
declared-examples = 0

# Keep the base model in memory between messages.
keep-model = true
"""


def superlink_script(control_port: int) -> str:
    """Starts the SuperLink on the server's loopback."""
    return _head("Starts the SuperLink of this federation") + _SUPERLINK.format(control_port=control_port)


def gate_script(port: int, control_port: int) -> str:
    """Starts the gate, the only process that other machines reach."""
    head = _head("Starts the gate in front of the SuperLink")
    return head + _GATE.format(port=port, control_port=control_port)


def node_script(address: str) -> str:
    """Checks a node's settings and data, then starts its SuperNode."""
    return _head("Starts this node") + _NODE.format(address=address)


def unit(what: str, folder: str, script: str, restart: int) -> str:
    """A systemd unit for a folder copied to ``/opt/fedlora``."""
    return _UNIT.format(what=what, folder=folder, script=script, restart=restart, refused=REQUEST_REFUSED)


def node_toml(partition_id: int, data: str, dataset_id: str) -> str:
    """A node's settings, to be edited by its owner; see `clients.node_settings`."""
    values = {"data": data, "dataset_id": dataset_id}
    quoted = {k: tomli_w.dumps({"v": v}).partition("=")[2].strip() for k, v in values.items()}
    return _NODE_TOML.format(partition_id=partition_id, **quoted)


def flower_config(ca: Path, control_port: int) -> str:
    """Flower's ``config.toml`` for the operator, who works on the server."""
    connection = {"address": f"127.0.0.1:{control_port}", "root-certificates": str(ca)}
    return tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}})


def _head(what: str) -> str:
    return _HEAD.format(what=what, quiet=" ".join(f"{key}={value}" for key, value in QUIET.items()))
