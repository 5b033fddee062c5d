"""Cohorts follow from the messages alone; what a machine holds is arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import MessageType, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.server.directory import RunDirectory
from fedlora.simulation.local_grid import LocalGrid
from fedlora.simulation.scheduling import cohorts, predicted_work, with_cohort_size
from tests.conftest import tiny_config
from tests.in_process import client_runtime


class Grid(LocalGrid):
    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError


def cut(
    partitions: list[int], size: int, works: list[float], kind: str = MessageType.TRAIN
) -> list[list[int]]:
    grid = Grid(range(40))
    messages = [grid.create_message(RecordDict(), kind, p + 2, "1") for p in partitions]
    groups = cohorts(messages, grid.partition_ids, size, works.__getitem__)
    return [[grid.partition_ids[m.metadata.dst_node_id] for m in group] for group in groups]


@given(
    count=st.integers(1, 40),
    size=st.integers(1, 12),
    works=st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=40, max_size=40),
    seed=st.integers(0, 10**6),
)
def test_cohorts_know_no_order_are_even_and_the_most_work_goes_first(
    count: int, size: int, works: list[float], seed: int
) -> None:
    partitions = list(range(count))
    groups = cut(partitions, size, works)
    shuffled = np.random.default_rng(seed).permutation(partitions).tolist()
    assert cut(shuffled, size, works) == groups
    flat = [p for group in groups for p in group]
    assert sorted(flat) == partitions
    assert [works[p] for p in flat] == sorted((works[p] for p in partitions), reverse=True)
    sizes = [len(group) for group in groups]
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-count // size)


def test_only_orders_to_train_are_grouped() -> None:
    assert cut([3, 1, 2], 8, [1.0] * 40, MessageType.EVALUATE) == [[1], [2], [3]]
    assert cut([3, 1, 2], 8, [1.0] * 40) == [[1, 2, 3]]


@pytest.mark.usefixtures("cache")
def test_work_is_what_a_client_trains_on() -> None:
    config = tiny_config(**{"data.partitioner": "linear", "data.num-partitions": 5, "train.batch-size": 6})
    data = client_runtime(config).data
    work = predicted_work(config, data)
    lengths = data.train.lengths
    assert work(2) == pytest.approx(3 * 6 * lengths[data.indices(2)].mean())
    epochs = replace(config, train=replace(config.train, local_epochs=1))
    works = [predicted_work(epochs, data)(p) for p in range(5)]
    assert works == sorted(works)
    assert works[4] > 3 * works[0]


@pytest.mark.usefixtures("cache")
def test_the_size_is_settled_before_a_run_and_kept_by_it(tmp_path: Path) -> None:
    config = tiny_config(**{"data.partitioner": "iid", "data.num-partitions": 40})
    runtime = client_runtime(config)
    settled = with_cohort_size(config, tmp_path / "none", runtime)
    assert settled.engine.cohort_size > 1
    assert with_cohort_size(settled, tmp_path / "none") == settled
    directory = RunDirectory(tmp_path / "run")
    directory.open(replace(config, engine=replace(config.engine, cohort_size=3)))
    assert with_cohort_size(config, directory.path, runtime).engine.cohort_size == 3
