"""The ServerApp, under ``flwr run`` and in deployment."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients.resident import configured
from fedlora.federation import Federation
from fedlora.runs import RunDirectory

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run under ``flwr run``; results go to ``output-dir``, else into ``runs/flwr-<run id>``."""
    config = configured(context.run_config)
    path = Path(config.output_dir or f"runs/flwr-{context.run_id}").absolute()
    Federation(config, RunDirectory(path)).run(grid)
