"""One base for all processes, cohorts and dealt batches: the same bits as without, and nobody writes."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from clients.evaluation import Evaluation, evaluate
from clients.training.batches import Indices
from fedlora.config import RunConfig, from_flat, to_flat
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.state import State
from fedlora.errors import ConfigError, RunFailed
from fedlora.server.callbacks import Checkpoint
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.session import Session
from fedlora.simulation import ray_grid
from fedlora.simulation.ray_grid import RayGrid
from fedlora.simulation.ray_pool import RayPool
from fedlora.simulation.scheduling import predicted_work
from fedlora.simulation.simulate import simulate_on
from tests.conftest import tiny_config
from tests.in_process import client_runtime, federated
from tests.simulation.test_ray_engine import MIXED, adapter

MANY: dict[str, Any] = {"data.partitioner": "iid", "data.num-partitions": 6, "engine.cohort-size": 3}


def lent(pool: RayPool, config: RunConfig, path: Path) -> dict[str, bytes]:
    simulate_on(pool, config, RunDirectory(path))
    return adapter(path)


def measured(path: Path) -> list[Any]:
    records = RunDirectory(path, resume=True).rounds()
    return [(r["accuracy"], r["loss"], r["accuracy_by_domain"]) for r in records]


@pytest.mark.parametrize("strategy", ["flora", "fedavg"])
def test_a_shared_base_gives_the_bits_and_figures_of_a_base_for_each(
    strategy: str, pool: RayPool, tmp_path: Path
) -> None:
    keys = MIXED if strategy == "flora" else {**MIXED, "lora.ranks": ""}
    config = tiny_config(**{**keys, "strategy.name": strategy, "engine.cohort-size": 1})
    together = lent(pool, config, tmp_path / "lent")
    own = federated(config, tmp_path / "own")
    own.run(RayGrid(pool, own.partitions, to_flat(config), tmp_path / "own" / "clients"))
    assert adapter(tmp_path / "own") == together
    assert measured(tmp_path / "own") == measured(tmp_path / "lent")


def spoil_pristine(federation: FederatedRun) -> None:
    """What an in-place merge would do, in this process; the actors map the same pages."""
    weights = federation.runtime.model._frozen
    next(w for name, w in weights.items() if "word_embeddings" in name).data[3, 3] += 1e-3


def spoil_moved(federation: FederatedRun) -> None:
    moved = federation.runtime.model.base.moved_weights
    assert moved
    next(iter(moved.values()))[0, 0] += 1e-3


@pytest.mark.parametrize("spoil", [spoil_pristine, spoil_moved])
def test_writing_into_a_shared_weight_ends_the_run(
    spoil: Callable[[FederatedRun], None], pool: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_round = Checkpoint.after_round

    def and_spoil(self: Checkpoint, run: FederatedRun, report: Any) -> None:
        after_round(self, run, report)
        if report.server_round == 3:
            spoil(run)

    monkeypatch.setattr(Checkpoint, "after_round", and_spoil)
    config = tiny_config(**{**MIXED, "seed": 5})
    with pytest.raises(RunFailed, match=r"base weight .* was written to"):
        simulate_on(pool, config, RunDirectory(tmp_path / "spoiled"))
    assert not (tmp_path / "spoiled" / "result.json").exists()
    with pytest.raises(ConfigError, match=r"--resume .* was written to"):
        RunDirectory(tmp_path / "spoiled", resume=True)
    monkeypatch.undo()
    simulate_on(pool, config, RunDirectory(tmp_path / "next"))


def test_cohorts_are_the_same_on_one_actor_and_on_two(pool: RayPool, tmp_path: Path) -> None:
    config = tiny_config(**MANY)
    two = lent(pool, config, tmp_path / "two")
    hidden = pool.actors.pop()
    try:
        assert lent(pool, config, tmp_path / "one") == two
    finally:
        pool.actors.append(hidden)
    assert lent(pool, from_flat({**to_flat(config), "engine.cohort-size": 1}), tmp_path / "alone") != two
    written = json.loads((tmp_path / "two" / "result.json").read_text())
    assert "reproducible" not in written


def test_a_cohort_whose_process_is_killed_is_trained_again_and_nobody_is_lost(
    pool: RayPool, tmp_path: Path
) -> None:
    """As the kernel kills when memory runs out; the process stands still, so that it dies in its work."""
    config = tiny_config(**MANY)
    expected = lent(pool, config, tmp_path / "expected")
    victim = ray.get(pool.actors[0].ready.remote())

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            os.kill(victim, signal.SIGSTOP)
            threading.Timer(1.0, os.kill, (victim, signal.SIGKILL)).start()

    path = tmp_path / "killed"
    federation = federated(config, path, stop)
    shared_model = pool.shared_model(config)
    grid = RayGrid(
        pool, federation.partitions, to_flat(config), path / "clients",
        shared_model=shared_model, cohort_size=3,
        work=predicted_work(config, shared_model.runtime.data),
    )  # fmt: skip
    federation.run(grid)
    assert grid.retries == 1
    assert adapter(path) == expected
    records = RunDirectory(path, resume=True).rounds()
    assert all(len(r["participants"]) == 6 and not r["refused"] for r in records)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_dealt_batches_give_the_figures_of_one_process(precision: str, pool: RayPool, tmp_path: Path) -> None:
    config = tiny_config(**{"evaluation-precision": precision})
    shared_model = pool.shared_model(config)
    data, model = shared_model.runtime.data, shared_model.runtime.model
    template = model.template(4, 2.0)
    generator = torch.Generator().manual_seed(0)
    adapters = fresh_adapters(template.modules, 4, 2.0, 0)
    for factors in adapters.values():
        factors.B.copy_(torch.randn(factors.B.shape, generator=generator))
    state = State(round=1, adapters=adapters, head=template.head, base=(), memory={}, seed=0)
    indices = np.tile(np.arange(len(data.test))[::-1], 6)  # twelve batches, two in a job
    two = pool.session(config, tmp_path).evaluate(state, indices)
    model.load(adapters, template.head)
    alone = evaluate(model, data.test, indices, data.pad_token_id, precision=precision)
    assert two.losses.tobytes() == alone.losses.tobytes()
    assert two.right.tobytes() == alone.right.tobytes()
    assert np.array_equal(two.indices, indices)


@pytest.mark.usefixtures("cache")
def test_no_model_is_evaluated_twice_on_the_same_examples(pool: RayPool, tmp_path: Path) -> None:
    config = tiny_config(**{"evaluate-every": 2, "num-server-rounds": 5})
    asked: list[tuple[int, int]] = []

    class Counting(Session):
        def evaluate(self, state: State, indices: Indices) -> Evaluation:
            asked.append((state.round, len(indices)))
            return super().evaluate(state, indices)

    session = Counting(config=config, runtime=client_runtime(config))
    federation = FederatedRun(session, RunDirectory(tmp_path))
    federation.run(RayGrid(pool, federation.partitions, to_flat(config), tmp_path / "clients"))
    assert asked == [(2, 60), (4, 60), (5, 128)]


def test_every_distinct_payload_is_put_into_the_object_store_once(
    pool: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ranks among six clients: three sets of arrays, each once a round."""
    put, counted = ray_grid._put_shared, list[int]()

    def counting(messages: Any) -> Any:
        records, stored = put(messages), set[str]()

        def of(message: Any) -> Any:
            found = records(message)
            stored.update(r.hex() for r in found.values() if isinstance(r, ray.ObjectRef))
            counted[-1] = len(stored)
            return found

        counted.append(0)
        return of

    monkeypatch.setattr(ray_grid, "_put_shared", counting)
    config = tiny_config(
        **{"data.partitioner": "iid", "data.num-partitions": 6, "lora.ranks": "2,4,3",
           "strategy.name": "flexlora", "engine.cohort-size": 1}
    )  # fmt: skip
    lent(pool, config, tmp_path / "ranks")
    assert counted == [3, 3, 3]
