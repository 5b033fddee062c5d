"""Runs on real Ray actors: the same bits with any number of them, and without those that died."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import load_file

from fedlora.config import EngineConfig, RunConfig, to_flat
from fedlora.errors import ConfigError, RunFailed
from fedlora.server.directory import RunDirectory
from fedlora.server.inputs import inputs_digest
from fedlora.simulation.ray_grid import RayGrid
from fedlora.simulation.ray_pool import RayPool
from fedlora.simulation.scheduling import with_cohort_size
from fedlora.simulation.simulate import simulate_on
from tests.conftest import tiny_config
from tests.in_process import federated

MIXED: dict[str, Any] = {
    "strategy.name": "flora",
    "data.partitioner": "iid",
    "data.num-partitions": 5,
    "fraction-train": 0.6,
    "lora.ranks": "2,4,3",
}


def adapter(path: Path) -> dict[str, bytes]:
    return {
        k: t.numpy().tobytes() for k, t in load_file(path / "adapter" / "adapter_model.safetensors").items()
    }


def run(pool: RayPool, config: RunConfig, path: Path) -> dict[str, bytes]:
    simulate_on(pool, config, RunDirectory(path))
    return adapter(path)


@pytest.mark.parametrize("strategy", ["fedavg", "flora", "local-only"])
def test_runs_are_repeatable(strategy: str, pool: RayPool, tmp_path: Path) -> None:
    """With a mean, a base that moves, and what stays at clients: no process can tell more of a rule."""
    config = tiny_config(**{"strategy.name": strategy, "fraction-train": 0.5})
    assert run(pool, config, tmp_path / "a") == run(pool, config, tmp_path / "b")
    other = tiny_config(**{"strategy.name": strategy, "fraction-train": 0.5, "seed": 2})
    assert run(pool, other, tmp_path / "c") != adapter(tmp_path / "a")
    last = RunDirectory(tmp_path / "a", resume=True).rounds()[-1]
    assert 0 <= last["accuracy"] <= 1
    assert last["refused"] == {}


def test_one_actor_gives_the_bits_of_two(pool: RayPool, tmp_path: Path) -> None:
    config = tiny_config(**MIXED)
    two = run(pool, config, tmp_path / "two")
    hidden = pool.actors.pop()
    try:
        assert run(pool, config, tmp_path / "one") == two
    finally:
        pool.actors.append(hidden)


def test_a_run_records_the_inputs_that_a_study_would_find(pool: RayPool, tmp_path: Path) -> None:
    """Before it runs, on the same engine: after other runs, and with a base that one of them moved."""
    config = tiny_config(**MIXED)
    for name in ("first", "second"):
        run(pool, config, tmp_path / name)
        record = json.loads((tmp_path / name / "provenance.json").read_text())
        runtime = pool.shared_model(config).runtime
        known = inputs_digest(with_cohort_size(config, tmp_path / "new", runtime), runtime)
        assert known is not None
        assert record["identity"]["inputs"] == known


def test_seeded_private_runs_are_repeatable_and_within_budget(pool: RayPool, tmp_path: Path) -> None:
    private = {"privacy.mode": "example", "privacy.target-epsilon": 4.0, "train.optimizer": "sgd"}
    config = tiny_config(**private)
    assert run(pool, config, tmp_path / "a") == run(pool, config, tmp_path / "b")
    records = RunDirectory(tmp_path / "a", resume=True).rounds()
    spent = [record["epsilon"] for record in records]
    assert spent == sorted(spent)
    assert spent[0] < spent[-1] <= 4.0
    assert spent[-1] > 3.9
    assert all(record["private"] and record["train_loss"] is None for record in records)


def test_a_killed_actor_is_replaced_and_its_client_trained_again(pool: RayPool, tmp_path: Path) -> None:
    config = tiny_config(**MIXED)
    expected = run(pool, config, tmp_path / "expected")
    victim = ray.get(pool.actors[0].ready.remote())

    def kill(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            os.kill(victim, signal.SIGKILL)

    federation = federated(config, tmp_path / "killed", kill)
    grid = RayGrid(pool, federation.partitions, to_flat(config), tmp_path / "killed" / "clients")
    federation.run(grid)
    assert grid.retries == 1
    assert adapter(tmp_path / "killed") == expected


def test_a_stopped_run_resumes_with_the_same_bits(pool: RayPool, tmp_path: Path) -> None:
    config = tiny_config(**MIXED)
    expected = run(pool, config, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            raise Stop

    path = tmp_path / "resumed"
    federation = federated(config, path, stop)
    with pytest.raises(Stop):
        federation.run(RayGrid(pool, federation.partitions, to_flat(config), path / "clients"))
    (path / "rounds.jsonl").open("a").write('{"round": 3, "half')
    simulate_on(pool, config, RunDirectory(path, resume=True))
    assert adapter(path) == expected
    assert [r["round"] for r in RunDirectory(path, resume=True).rounds()] == [1, 2, 3]


def test_a_private_round_before_the_first_checkpoint_is_charged_once(
    pool: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = {"privacy.mode": "example", "privacy.target-epsilon": 8.0, "privacy.accountant": "rdp"}
    config = tiny_config(**private)
    whole = simulate_on(pool, config, RunDirectory(tmp_path / "whole"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunDirectory, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            simulate_on(pool, config, RunDirectory(tmp_path / "resumed"))
    resumed = simulate_on(pool, config, RunDirectory(tmp_path / "resumed", resume=True))
    assert resumed["epsilon_by_client"] == whole["epsilon_by_client"]
    assert adapter(tmp_path / "resumed") == adapter(tmp_path / "whole")


def test_clients_past_the_deadline_are_left_out(pool: RayPool, tmp_path: Path) -> None:
    config = tiny_config(**{"round-timeout": 0.001})
    with pytest.raises(RunFailed, match="no reply before the deadline"):
        simulate_on(pool, config, RunDirectory(tmp_path / "late"))
    assert not (tmp_path / "late" / "adapter").exists()
    run(pool, tiny_config(), tmp_path / "next")


def test_resources_that_no_machine_has_are_refused(pool: RayPool) -> None:
    with pytest.raises(ConfigError, match="no machine has them"):
        RayPool(EngineConfig(num_gpus=3.0, num_actors=1))


def test_a_local_head_stays_at_the_client(pool: RayPool, tmp_path: Path) -> None:
    config = tiny_config(**{"model.head": "local"})
    result = simulate_on(pool, config, RunDirectory(tmp_path / "local"))
    records = RunDirectory(tmp_path / "local", resume=True).rounds()
    assert len(records[-1]["accuracy_by_client"]) == 4
    assert result["accuracy_by_client"] == records[-1]["accuracy_by_client"]
    shared = tiny_config()
    result = simulate_on(pool, shared, RunDirectory(tmp_path / "shared"))
    by_domain = list(result["accuracy_by_domain"].values())
    assert list(result["accuracy_by_client"].values()) == by_domain, "each of the four holds one domain"
    assert result["accuracy_worst_client"] == result["accuracy_worst_decile"] == min(by_domain)
    head_bytes = 4 * 4 * (32 * 4 + 4)
    up = RunDirectory(tmp_path / "shared", resume=True).rounds()[0]["bytes_up"]
    assert up - records[0]["bytes_up"] == head_bytes
