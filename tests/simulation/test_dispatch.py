"""Who gets which message when, and what happens to those whose process dies; on actors without a model."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from fedlora.config import EngineConfig
from fedlora.errors import RunFailed
from fedlora.simulation import dispatch
from fedlora.simulation.ray_grid import RayGrid
from fedlora.simulation.ray_pool import RayPool
from tests.simulation.conftest import CPUS, GPUS
from tests.simulation.light import LIGHT, order, partitions_of


@pytest.fixture(scope="module")
def light(own_ray: None) -> Iterator[RayPool]:
    light = RayPool(EngineConfig(num_gpus=1.0, max_retries=2), LIGHT)
    yield light
    light.close()


def grid_of(pool: RayPool, path: Path, **options: Any) -> RayGrid:
    return RayGrid(pool, range(6), {}, path, **options)


def begun(path: Path) -> list[int]:
    """The partitions in the order in which their messages were begun."""
    marks = sorted(path.iterdir(), key=lambda mark: int(mark.name.split("-")[2]))
    return [int(mark.name.split("-")[0]) for mark in marks]


def test_every_logical_gpu_has_an_actor_of_its_own(light: RayPool, tmp_path: Path) -> None:
    grid = grid_of(light, tmp_path)
    assert light.size == 2
    ray.get([actor.ready.remote() for actor in light.actors])
    replies = list(grid.send_and_receive([order(grid, p) for p in range(6)]))
    assert sorted(partitions_of(replies)) == list(range(6))
    seen = {r.content.config_records["config"]["gpus"] for r in replies}
    assert seen == {"0", "1"}


def test_the_most_work_goes_first_whatever_the_order_of_the_messages(light: RayPool, tmp_path: Path) -> None:
    work = {0: 1.0, 1: 5.0, 2: 3.0, 3: 5.0, 4: 2.0, 5: 9.0}
    hidden = light.actors.pop()
    try:
        grid = grid_of(light, tmp_path, work=work.__getitem__)
        list(grid.send_and_receive([order(grid, p) for p in (4, 0, 3, 1, 5, 2)]))
    finally:
        light.actors.append(hidden)
    assert begun(tmp_path) == [5, 1, 3, 2, 4, 0]


def test_a_process_that_is_killed_in_its_work_is_replaced_and_nobody_is_lost(
    light: RayPool, tmp_path: Path
) -> None:
    grid = grid_of(light, tmp_path)
    messages = [order(grid, p) for p in range(5)] + [order(grid, 5, "die", times=2)]
    assert sorted(partitions_of(list(grid.send_and_receive(messages)))) == list(range(6))
    assert grid.retries == 2
    assert begun(tmp_path).count(5) == 3


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group whose processes the kernel kills where they take more than 100 MB besides."""
    roots = [(Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")]
    root, limit = next(((r, name) for r, name in roots if (r / "cgroup.procs").exists()), roots[1])
    group = root / f"fedlora-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text("100000000")
    except OSError as error:
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    yield group / "cgroup.procs"
    with contextlib.suppress(OSError):
        group.rmdir()


def test_a_process_that_the_kernel_kills_for_memory_is_replaced_and_nobody_is_lost(
    light: RayPool, tmp_path: Path, small_group: Path
) -> None:
    grid = grid_of(light, tmp_path)
    messages = [order(grid, p) for p in range(5)] + [order(grid, 5, "eat", times=1, group=str(small_group))]
    assert sorted(partitions_of(list(grid.send_and_receive(messages)))) == list(range(6))
    assert grid.retries == 1
    assert begun(tmp_path).count(5) == 2


def test_a_process_that_always_dies_ends_the_run_after_the_stated_number(
    light: RayPool, tmp_path: Path
) -> None:
    grid = grid_of(light, tmp_path)
    with pytest.raises(RunFailed, match=r"^partition 3: the process died 3 times \(engine.max-retries = 2\)"):
        grid.send_and_receive([order(grid, 3, "die", times=99)])
    assert begun(tmp_path) == [3, 3, 3]
    assert partitions_of(list(grid.send_and_receive([order(grid, 1)]))) == [1]


def test_a_straggler_is_dropped_and_does_not_hold_up_what_comes_next(light: RayPool, tmp_path: Path) -> None:
    grid = grid_of(light, tmp_path)
    list(grid.send_and_receive([order(grid, p) for p in range(6)]))  # everybody has started
    before = light.restarts
    replies = list(grid.send_and_receive([order(grid, 0, "sleep"), order(grid, 1)], timeout=5.0))
    assert partitions_of(replies) == [1]
    assert light.restarts == before + 1
    started = time.monotonic()
    assert len(list(grid.send_and_receive([order(grid, p) for p in range(6)]))) == 6
    assert time.monotonic() - started < 30


def test_a_client_that_raises_is_one_line_and_not_tried_again(light: RayPool, tmp_path: Path) -> None:
    grid = grid_of(light, tmp_path)
    (reply,) = grid.send_and_receive([order(grid, 2, "raise")])
    assert reply.error.reason == "ValueError: first line"
    assert begun(tmp_path) == [2]


def test_actors_that_die_while_they_start_end_the_run(light: RayPool, tmp_path: Path) -> None:
    broken = RayPool(
        EngineConfig(num_cpus=0.001, num_actors=1, max_retries=1), "tests.simulation.nowhere:app"
    )
    grid = grid_of(broken, tmp_path)
    try:
        with pytest.raises(RunFailed, match=r"die while they start \(engine.max-retries = 1\).*"):
            grid.send_and_receive([order(grid, 0)])
    finally:
        broken.close()


def test_an_actor_that_finds_no_place_holds_up_nobody(light: RayPool, tmp_path: Path) -> None:
    nowhere = light._spawn()  # both GPUs are taken
    light.actors.insert(0, nowhere)
    try:
        grid = grid_of(light, tmp_path)
        assert len(list(grid.send_and_receive([order(grid, p) for p in range(4)], timeout=30))) == 4
    finally:
        light.actors.remove(nowhere)
        light.starting.pop(nowhere)
        ray.kill(nowhere)


def test_a_wait_says_what_it_waits_for_and_goes_on_when_there_is_room(
    light: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both GPUs belong to the other actors, which is no mistake: they may end."""
    monkeypatch.setattr(dispatch, "PATIENCE", 1.0)
    late = RayPool(EngineConfig(num_cpus=0.5, num_gpus=1.0, num_actors=1), LIGHT)
    grid = grid_of(late, tmp_path)
    try:
        while ray.available_resources().get("GPU", 0):  # the other actors are on their way
            time.sleep(0.1)
        assert list(grid.send_and_receive([order(grid, 0)], timeout=2.5)) == []
        (said,) = [r.getMessage().partition(";")[2] for r in caplog.records]
        assert re.fullmatch(rf" [\d.]+ of {CPUS} CPUs free, 0 of {GPUS} GPUs free", said)
        assert (
            "waiting for one of 1 client processes to start: each takes engine.num-cpus = 0.5" in caplog.text
        )
        light.replace(light.actors[0])
        assert partitions_of(list(grid.send_and_receive([order(grid, 0)], timeout=120))) == [0]
    finally:
        late.close()


def test_a_cluster_that_loses_the_machines_for_its_actors_ends_the_run(
    light: RayPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "PATIENCE", 1.0)
    late = RayPool(EngineConfig(num_gpus=1.0, num_actors=1), LIGHT)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    grid = grid_of(late, tmp_path)
    try:
        with pytest.raises(RunFailed, match=r"^the cluster has shrunk: .*no machine has them"):
            grid.send_and_receive([order(grid, 0)])
    finally:
        late.close()
