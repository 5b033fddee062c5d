"""The stock app without a SuperLink, by Flower's deprecated ``run_simulation``: it starts faster.

STOCK_APP_SETTING=SETTING.toml python -m lora_app.simulate NUM_SUPERNODES NUM_GPUS
"""

from __future__ import annotations

import sys

from flwr.simulation import run_simulation

from lora_app.client_app import app as client_app
from lora_app.server_app import app as server_app

if __name__ == "__main__":
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=int(sys.argv[1]),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": float(sys.argv[2])}},
    )
