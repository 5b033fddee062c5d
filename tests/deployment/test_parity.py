"""The same federation simulated and deployed, on nodes that own their data: one adapter, bit for bit."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedlora.assets.fetch import asset_path
from fedlora.config import DataConfig, EngineConfig, RunConfig, from_flat
from fedlora.data.sources import load_examples
from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.loopback import Loopback
from fedlora.deployment.operator.submit import submit
from fedlora.errors import AssetError, ConfigError
from fedlora.server.directory import RunDirectory
from fedlora.simulation.ray_pool import RayPool
from fedlora.simulation.simulate import simulate_on

pytestmark = [pytest.mark.deployed, pytest.mark.real, pytest.mark.timeout(1500)]

NODES, ROWS = 3, 40
ADAPTER = Path("adapter") / "adapter_model.safetensors"
KEYS: dict[str, Any] = {
    "num-server-rounds": 2,
    "seed": 7,
    "fraction-train": 0.67,
    "min-available-nodes": NODES,
    "data.domain-column": "domain",
    "data.evaluate-examples": 10,
    "data.max-length": 16,
    "train.local-steps": 2,
    "train.batch-size": 4,
}
STRATEGIES: list[dict[str, Any]] = [
    {"strategy.name": "fedavg"},
    {"strategy.name": "flora", "lora.ranks": "2,8,4"},
    {"strategy.name": "lora-fair"},
    {"strategy.name": "fedsvd"},
]


@dataclass(frozen=True)
class Deployed:
    """A federation that is up, and the run that it shares with a simulation."""

    loopback: Loopback
    keys: dict[str, Any]
    pool: RayPool

    def config(self, **more: Any) -> RunConfig:
        return from_flat({**self.keys, **more})


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Three nodes that each own one domain, and actors for the simulation."""
    home = tmp_path_factory.mktemp("deployed")
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("FEDLORA_CACHE", raising=False)
        try:
            asset_path("minilm")
            asset_path("sentiment")
        except AssetError as error:
            pytest.skip(str(error))
        keys, files = written(home)
        layout = create(home / "federation", NODES, data=[str(file) for file in files])
        pool = RayPool(EngineConfig(num_actors=1, num_cpus=0.5))
        try:
            with Loopback(layout, print) as loopback:
                yield Deployed(loopback, {**KEYS, **keys}, pool)
        finally:
            pool.close()


def written(home: Path) -> tuple[dict[str, Any], list[Path]]:
    """The keys of the data that the simulation deals to its clients, and the files that the nodes own."""
    raw = load_examples(DataConfig())
    rows = [
        {"text": row["text"], "label": raw.label_names[row["label"]], "domain": row["domain"]}
        for row in raw.train
    ]
    domains = sorted({row["domain"] for row in rows})[:NODES]
    held = {domain: [row for row in rows if row["domain"] == domain][: ROWS + 10] for domain in domains}
    parts = {"train": [], "test": []}  # type: dict[str, list[dict[str, str]]]
    files = []
    for domain in domains:
        parts["train"] += held[domain][:ROWS]
        parts["test"] += held[domain][ROWS:]
        files.append(write(home / f"{domain}.jsonl", held[domain][:ROWS]))
    train, test = (write(home / f"{name}.jsonl", rows) for name, rows in parts.items())
    return {"data.name": str(train), "data.test": str(test)}, files


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("keys", STRATEGIES, ids=lambda keys: keys["strategy.name"])
def test_simulation_and_deployment_end_on_the_same_adapter(
    keys: dict[str, Any], deployed: Deployed, tmp_path: Path
) -> None:
    config = deployed.config(**keys, **{"engine.cohort-size": 1})
    told: list[dict[str, Any]] = []
    submit(deployed.loopback.layout, config, tmp_path / "deployed", progress=told.append)
    simulate_on(deployed.pool, config, RunDirectory(tmp_path / "simulated"))
    assert (tmp_path / "deployed" / ADAPTER).read_bytes() == (tmp_path / "simulated" / ADAPTER).read_bytes()
    records = [RunDirectory(tmp_path / n, resume=True).rounds() for n in ("deployed", "simulated")]
    assert told == records[0]
    for deployed_round, simulated_round in zip(*records, strict=True):
        assert len(deployed_round["participants"]) == 2
        for key in ("participants", "accuracy", "train_loss", "bytes_up", "bytes_down", "gap"):
            assert deployed_round[key] == simulated_round[key]
    for entry in deployed.loopback.layout.nodes:
        assert not (deployed.loopback.layout.node(entry) / "state" / "model.failed").exists()


def test_a_run_that_cannot_be_carried_out_fails_with_its_reason(deployed: Deployed, tmp_path: Path) -> None:
    """The ServerApp finds out, on another process; its reason and the exit code's kind come back."""
    config = deployed.config(**{"partitions": "0-7"})
    with pytest.raises(ConfigError, match=re.escape("partitions = '0-7': the nodes are partitions 0 to 2")):
        submit(deployed.loopback.layout, config, tmp_path / "run")


def test_through_the_gate_nobody_can_start_a_run_or_take_a_task(deployed: Deployed) -> None:
    """Flower itself would let anybody who reaches its port do so."""
    layout, ports = deployed.loopback.layout, deployed.loopback.ports
    context = ssl.create_default_context(cafile=str(layout.server / "ca.crt"))
    with httpx.Client(verify=context, trust_env=False) as client:
        for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task"):
            headers = {"content-type": "application/protobuf"}
            through_gate = client.post(f"https://127.0.0.1:{ports['gate']}{path}", headers=headers)
            assert through_gate.status_code == 404
        unsigned = client.post(f"https://127.0.0.1:{ports['gate']}/v1/fleet/pull-messages", headers=headers)
        assert unsigned.status_code == 401
        direct = client.post(f"https://127.0.0.1:{ports['superlink']}/v1/control/list-runs", headers=headers)
        assert direct.status_code == 200, (
            "if Flower guards this itself one day, the page on deployment says so"
        )
