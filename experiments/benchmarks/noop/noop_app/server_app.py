"""Flower's FedAvg on ten numbers, with the seconds of each round written down."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds, then ``out``."""
    config = context.run_config
    nodes, ends = int(config["nodes"]), [time.monotonic()]
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)

    def note(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        ends.append(time.monotonic())
        return None

    strategy.start(
        grid,
        ArrayRecord({"x": Array(np.zeros(10, np.float32))}),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=note,
    )
    seconds = [after - before for before, after in pairwise(ends[1:])]  # ends[1]: before round 1
    Path(str(config["out"])).write_text(json.dumps(seconds) + "\n")
