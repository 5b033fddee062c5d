from __future__ import annotations

import time
from typing import Any, get_args

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config import DataConfig
from fedlora.config.sections import Partitioner
from fedlora.data.partition import partition
from fedlora.errors import ConfigError

DISJOINT = [name for name in get_args(Partitioner) if name != "bootstrap"]
SKEWED: dict[str, Any] = {
    "label": [i % 4 for i in range(400)],
    "domain": [["east", "north", "south", "west"][min(i // 50, 3)] for i in range(400)],
    "group": [f"writer {i // 5}" for i in range(400)],
}


def table(**columns: Any) -> Dataset:
    return Dataset.from_dict({**SKEWED, **columns})


def config(**values: Any) -> DataConfig:
    return DataConfig(**{"partitioner": "natural", **values})


def columns_of(parts: list[np.ndarray], column: str) -> list[set[str]]:
    values = np.array(SKEWED[column])
    return [set(values[part].tolist()) for part in parts]


@pytest.mark.parametrize("name", DISJOINT)
def test_disjoint_complete_sorted_and_seeded(name: str) -> None:
    wanted = config(partitioner=name, num_partitions=5)
    first, again, other = (partition(table(), wanted, seed) for seed in (1, 1, 2))
    assert len(first) == 5
    assert np.array_equal(np.sort(np.concatenate(first)), np.arange(400))
    assert all(np.all(np.diff(part) > 0) and part.dtype == np.int64 for part in first)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    seed=st.integers(0, 10**6),
    count=st.integers(1, 12),
    name=st.sampled_from(DISJOINT),
    data=st.data(),
)
def test_every_answer_is_a_partition(
    labels: list[int], seed: int, count: int, name: str, data: st.DataObject
) -> None:
    size = len(labels)
    domains = data.draw(st.lists(st.sampled_from("pqr"), min_size=size, max_size=size))
    groups = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=size, max_size=size))
    rows = Dataset.from_dict({"label": labels, "domain": domains, "group": groups})
    wanted = config(partitioner=name, num_partitions=count, classes_per_partition=2)
    try:
        parts = partition(rows, wanted, seed)
    except ConfigError:
        assert name not in ("iid", "natural") or count > size
        return
    assert len(parts) == count
    assert min(map(len, parts)) >= 1
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(size))


def test_iid_does_not_follow_the_order_of_the_rows() -> None:
    parts = partition(table(label=sorted(SKEWED["label"])), config(partitioner="iid", num_partitions=4), 0)
    assert {len(part) for part in parts} == {100}
    assert columns_of(parts, "domain") == [{"east", "north", "south", "west"}] * 4
    shares = [np.bincount(np.sort(SKEWED["label"])[part], minlength=4) / 100 for part in parts]
    assert np.abs(np.array(shares) - 0.25).max() < 0.15


def test_small_alpha_is_skewed() -> None:
    def purity(alpha: float) -> float:
        wanted = config(partitioner="dirichlet", num_partitions=8, dirichlet_alpha=alpha)
        parts = partition(table(), wanted, 3)
        labels = np.array(SKEWED["label"])
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert purity(100.0) < 0.35 < 0.6 < purity(0.1)


def test_the_seed_draws_the_shares_too() -> None:
    wanted = config(partitioner="dirichlet", num_partitions=4)
    sizes = {tuple(len(part) for part in partition(table(), wanted, seed)) for seed in range(3)}
    assert len(sizes) == 3


def test_pathological_clients_hold_exactly_so_many_labels() -> None:
    for classes in (1, 2, 3):
        wanted = config(partitioner="pathological", num_partitions=8, classes_per_partition=classes)
        parts = partition(table(), wanted, 0)
        assert {len(held) for held in columns_of(parts, "label")} == {classes}


def test_two_shards_hold_few_labels() -> None:
    parts = partition(table(), config(partitioner="shard", num_partitions=8), 0)
    assert max(len(held) for held in columns_of(parts, "label")) <= 2
    assert {len(part) for part in parts} == {50}


@pytest.mark.parametrize(("name", "exponent"), [("linear", 1), ("square", 2)])
def test_sizes_grow_with_the_partition_id(name: str, exponent: int) -> None:
    parts = partition(table(), config(partitioner=name, num_partitions=4), 0)
    units = np.arange(1, 5) ** exponent
    assert np.allclose([len(part) for part in parts], 400 * units / units.sum(), atol=4)


def test_natural_clients_are_the_values_in_order() -> None:
    parts = partition(table(), config(), 0)
    assert columns_of(parts, "domain") == [{"east"}, {"north"}, {"south"}, {"west"}]


def test_natural_numbers_keep_their_order() -> None:
    parts = partition(table(group=[str(i // 20) for i in range(400)]), config(partition_by="group"), 0)
    assert [part[0] // 20 for part in parts] == list(range(20))


def test_feature_and_label_shift_at_once() -> None:
    """Each client is of one domain, and the clients of a domain differ in their labels."""
    wanted = config(partitioner="natural-dirichlet", num_partitions=8, dirichlet_alpha=0.1)
    parts = partition(table(), wanted, 3)
    assert columns_of(parts, "domain") == [
        {name} for name in ("east", "north", "south", "west") for _ in "ab"
    ]
    labels = np.array(SKEWED["label"])
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        shares = [np.bincount(labels[part], minlength=4) / len(part) for part in (first, second)]
        assert np.abs(shares[0] - shares[1]).sum() > 0.5
    even = partition(table(), config(partitioner="natural-dirichlet", num_partitions=4), 3)
    natural = partition(table(), config(), 3)
    assert all(np.array_equal(a, b) for a, b in zip(even, natural, strict=True))


def test_fewer_clients_than_values_cannot_be_told_apart_by_them() -> None:
    with pytest.raises(ConfigError, match="natural-dirichlet needs one or more for each of the 4 values"):
        partition(table(), config(partitioner="natural-dirichlet", num_partitions=3), 3)


def test_a_column_of_its_own_wins_over_the_name() -> None:
    parts = partition(table(natural=["b", "a"] * 200), config(), 0)
    assert [part[0] for part in parts] == [1, 0]


def test_more_clients_than_domains_split_each_domain_evenly_by_whole_groups() -> None:
    parts = partition(table(), config(num_partitions=8), 0)
    held = columns_of(parts, "domain")
    assert all(len(domains) == 1 for domains in held)
    assert [held.count({d}) for d in ("east", "north", "south", "west")] == [2, 2, 2, 2]
    groups = columns_of(parts, "group")
    assert sum(map(len, groups)) == len(set().union(*groups)), "a group lies with two clients"
    assert max(len(part) for part in parts[:2]) - min(len(part) for part in parts[:2]) <= 5


def test_more_clients_than_groups_split_groups_too() -> None:
    parts = partition(table(), config(num_partitions=300), 0)
    assert {len(part) for part in parts} <= {1, 2, 3, 4}
    assert all(len(domains) == 1 for domains in columns_of(parts, "domain"))


def test_fewer_clients_than_groups_get_whole_groups_of_one_domain() -> None:
    parts = partition(table(), config(partition_by="group", num_partitions=10), 0)
    groups = columns_of(parts, "group")
    assert sum(map(len, groups)) == 80
    assert all(len(domains) == 1 for domains in columns_of(parts, "domain"))


def test_a_group_in_two_domains_stays_whole() -> None:
    groups = ["both" if i % 50 == 0 else f"g{i}" for i in range(400)]
    parts = partition(table(group=groups), config(partition_by="group", num_partitions=9), 0)
    rows = np.flatnonzero(np.array(groups) == "both")
    assert sum(bool(np.isin(rows, part).any()) for part in parts) == 1


def test_a_domain_in_which_no_group_begins_gets_no_client() -> None:
    both = table(domain=["west", "east"] * 200, group=[f"g{i // 2}" for i in range(400)])
    parts = partition(both, config(partition_by="group", num_partitions=10), 0)
    assert {len(part) for part in parts} == {40}


def test_fewer_clients_than_domains_get_whole_domains() -> None:
    for by in ("domain", "group"):
        parts = partition(table(), config(partition_by=by, num_partitions=2), 0)
        domains = columns_of(parts, "domain")
        assert not domains[0] & domains[1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"partitioner": "iid", "num_partitions": 401}, "data.num-partitions = 401: .*400"),
        ({"partition_by": "shop"}, "data.partition-by = 'shop'"),
        ({"partitioner": "linear", "num_partitions": 100}, "'linear' with data.num-partitions = 100"),
        (
            {"partitioner": "dirichlet", "num_partitions": 300, "dirichlet_alpha": 0.1},
            "data.dirichlet-alpha = 0.1",
        ),
        (
            {"partitioner": "pathological", "num_partitions": 4, "classes_per_partition": 9},
            "'pathological' with data.num-partitions = 4: .*=9",
        ),
        (
            {"partitioner": "pathological", "num_partitions": 2, "classes_per_partition": 1},
            "data.classes-per-partition = 1: 2 partitions leave out labels 2, 3",
        ),
        ({"min_partition_size": 60}, "data.min-partition-size = 60: partition 0 of 4 .*has 50"),
    ],
)
def test_refusals_are_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        partition(table(), config(**values), 0)
    assert "\n" not in str(caught.value)


def test_bootstrap_draws_each_client_with_replacement_for_any_number_of_clients() -> None:
    wanted = config(partitioner="bootstrap", num_partitions=2000, partition_size=16)
    parts, again, other = (partition(table(), wanted, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))
    assert {len(part) for part in parts} == {16}
    assert all((np.diff(part) >= 0).all() for part in parts)
    times = np.bincount(np.concatenate(parts), minlength=400)
    assert times.min() > 40  # 80 of each are expected, 9 is one standard deviation
    assert times.max() < 120
    # P(16 draws out of 400 are all different) = 0.74
    assert 0.65 < np.mean([len(set(part)) == 16 for part in parts]) < 0.82


@pytest.mark.parametrize("name", ["iid", "natural", "shard", "pathological"])
def test_ten_thousand_clients_cost_seconds(name: str) -> None:
    rows = 40_000
    many = Dataset.from_dict(
        {
            "label": np.arange(rows) % 10,
            "domain": np.arange(rows) % 7,
            "group": np.arange(rows) // 2,
        }
    )
    wanted = config(partitioner=name, num_partitions=10_000, partition_by="group")
    started = time.perf_counter()
    parts = partition(many, wanted, 0)
    assert time.perf_counter() - started < 15
    assert len(parts) == 10_000
