"""The ServerApp, under ``flwr run`` and in deployment."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients.runtime import configured, read_runtime
from fedlora.config import RunConfig
from fedlora.core.files import write_atomic
from fedlora.deployment.operator.layout import FAILURE, OWN, NodeKeys, declared_examples_of, peers_of, roll_of
from fedlora.deployment.superlink.polling_grid import PollingGrid
from fedlora.errors import ConfigError, FedLoraError, system_errors_in_words
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.session import Session
from fedlora.server.validate import check
from strategies.nodes import NodeDirectory

FEDERATION = "FEDLORA_FEDERATION"
"""Names the server's ``federation.toml`` in a deployment that ``fedlora federation init`` made."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run under ``flwr run``; results go to ``output-dir``, else into ``runs/flwr-<run id>``."""
    config = configured(context.run_config)
    path = Path(config.output_dir or f"runs/flwr-{context.run_id}").absolute()
    directory = RunDirectory(path, resume=config.resume)
    try:
        with system_errors_in_words():
            sys.path.append(str(path / OWN))  # a strategy of the operator's own, see `submit`
            check(config)
            FederatedRun(_session(config), directory).run(PollingGrid(grid))
    except FedLoraError as error:
        failure = {"wrong-request": isinstance(error, ConfigError), "reason": str(error)}
        with suppress(OSError):  # on a full disk the log alone has the reason
            write_atomic(path / FAILURE, json.dumps(failure) + "\n")
        raise


def _session(config: RunConfig) -> Session:
    """Directory of the nodes: where keys stand for partitions, theirs are the only ones that take part."""
    runtime, file = read_runtime(config), os.environ.get(FEDERATION)
    if not file:
        return Session(config=config, runtime=runtime)
    keys = NodeKeys(lambda: roll_of(Path(file)))
    nodes = sorted(keys.partitions.values())
    return Session(
        config=config,
        runtime=runtime,
        nodes=nodes,
        declared_examples=declared_examples_of(Path(file)),
        node_directory=NodeDirectory(keys),
        peers=peers_of(Path(file)) if config.secure.mode == "sums" else None,
    )
