"""Partitions of the training examples, as arrays of indices: natural, or by flwr-datasets' partitioners."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.config import DataConfig
from fedlora.core.seeding import derive, stream
from fedlora.data.columns import BY_NATURE, NATURAL, codes_of, in_order
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

SHARDS_PER_PARTITION = 2
"""As in McMahan et al., Communication-Efficient Learning (AISTATS 2017)."""


def partition(
    train: Dataset, config: DataConfig, seed: int, known: Mapping[str, np.ndarray] | None = None
) -> list[np.ndarray]:
    """The training examples of each client: sorted int64 indices, disjoint and together all of them.

    ``known`` says by column which values there are, sorted; else those of the examples. A value without an
    example keeps its number: a client of nature with no indices.

    ``natural`` makes each value of ``data.partition-by`` a client. With ``data.num-partitions`` set
    it deals whole values, domain by domain where it can, to that many clients of similar size; where
    there are fewer values than clients, each value's examples are dealt to its share of the clients
    (4 domains, 8 clients: 2 for each), groups kept whole if there are enough of them.

    ``iid``, ``linear``, ``square`` and ``exponential`` cut shuffled examples; ``dirichlet``,
    ``pathological`` and ``shard`` (two shards of the examples sorted by label) go by the label.

    ``natural-dirichlet`` gives each natural value its share of the clients (of 14, two for each of 7 domains)
    and cuts its examples among them by Dirichlet label skew: clients differ in domain and in labels.

    ``bootstrap`` is for any number of clients: each draws ``data.partition-size`` examples with
    replacement, so that clients share examples and one may hold an example twice.

    Raises:
        ConfigError: an unknown column, more clients than examples, a client with fewer than
            ``data.min-partition-size``, or a partitioner that cannot do what is asked.
    """
    if config.partitioner == "bootstrap":
        rng = stream(seed, "partition-bootstrap")
        drawn = rng.integers(len(train), size=(config.num_partitions, config.partition_size))
        return list(np.sort(drawn, axis=1))
    if config.num_partitions > len(train):
        raise ConfigError(
            f"data.num-partitions = {config.num_partitions}: there are only {len(train)} training examples"
        )
    labels = np.asarray(train["label"][:])
    if config.partitioner == "natural":
        clients, count = _natural_clients(train, config, seed, known or {})
        parts = _grouped(clients, count)
    elif config.partitioner == "natural-dirichlet":
        parts = _skewed_within_values(train, labels, config, seed, known or {})
    else:
        order = stream(seed, "partition-order").permutation(len(train))
        parts = [np.sort(order[rows]) for rows in _rows(labels[order], config, seed)]
    _check_parts(parts, labels, config)
    return parts


def _grouped(clients: np.ndarray, count: int) -> list[np.ndarray]:
    """The examples of each of ``count`` clients."""
    ends = np.cumsum(np.bincount(clients, minlength=count))[:-1]
    return np.split(np.argsort(clients, kind="stable"), ends)


def _skewed_within_values(
    train: Dataset, labels: np.ndarray, config: DataConfig, seed: int, known: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """The clients of one natural value after those of another."""
    values, count = _natural_values(train, config, known)
    sizes = np.bincount(values, minlength=count)
    if config.num_partitions < len(sizes):
        raise ConfigError(
            f"data.num-partitions = {config.num_partitions}: natural-dirichlet needs one or more for each of "
            f"the {len(sizes)} values of data.partition-by = {config.partition_by!r}"
        )
    parts: list[np.ndarray] = []
    for value, share in enumerate(_shares(sizes, sizes, config.num_partitions)):
        rows = stream(seed, "partition-order", value).permutation(np.flatnonzero(values == value))
        within = replace(config, partitioner="dirichlet", num_partitions=share)
        cut = _rows(labels[rows], within, derive(seed, "partition", value)) if share > 1 else [slice(None)]
        parts += [np.sort(rows[chosen]) for chosen in cut]
    return parts


def _natural_values(
    train: Dataset, config: DataConfig, known: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, int]:
    """The number of each example's natural value, and how many values there are."""
    column = natural_column(train.column_names, config)
    if column not in known:
        values = _codes(train, column)
        return values, int(values.max()) + 1
    values = np.searchsorted(known[column], np.asarray(train[column][:]))
    return values, len(known[column])


def natural_column(names: Collection[str], config: DataConfig) -> str:
    """The column whose values are the clients."""
    return NATURAL if NATURAL in names else config.partition_by


def _rows(labels: np.ndarray, config: DataConfig, seed: int) -> list[Sequence[int] | np.ndarray]:
    """Rows of the shuffled examples for each client, from a partitioner of flwr-datasets."""
    from datasets import Dataset

    partitioner = _partitioner(config, len(labels), derive(seed, "partition"))
    partitioner.dataset = Dataset.from_dict({"row": np.arange(len(labels)), "label": labels})
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            partitioner.load_partition(0)
        except ValueError as error:
            raise ConfigError(
                f"data.partitioner = {config.partitioner!r} with data.num-partitions = "
                f"{config.num_partitions}: {_why(error, config)}"
            ) from None
    # The public load_partition builds a Dataset for each client: 1 to 2 ms, 20 s for 10,000.
    found = partitioner._partition_id_to_indices
    if config.partitioner == "shard":  # it has sorted its dataset
        rows = np.asarray(partitioner.dataset["row"][:])
        return [rows[found[i]] for i in range(len(found))]
    return [found[i] for i in range(len(found))]


def _partitioner(config: DataConfig, num_examples: int, seed: int) -> Any:
    from flwr_datasets import partitioner as flwr

    count = config.num_partitions
    match config.partitioner:
        case "dirichlet":
            return flwr.DirichletPartitioner(
                count, "label", config.dirichlet_alpha, config.min_partition_size, seed=seed
            )
        case "pathological":
            return flwr.PathologicalPartitioner(
                count, "label", config.classes_per_partition, "first-deterministic", seed=seed
            )
        case "shard":
            size = -(-num_examples // (SHARDS_PER_PARTITION * count))
            return flwr.ShardPartitioner(
                count, "label", shard_size=size, keep_incomplete_shard=True, seed=seed
            )
        case "linear":
            return flwr.LinearPartitioner(count)
        case "square":
            return flwr.SquarePartitioner(count)
        case "exponential":
            return flwr.ExponentialPartitioner(count)
        case _:  # iid
            share, more = divmod(num_examples, count)
            return flwr.SizePartitioner([share + (client < more) for client in range(count)])


def _check_parts(parts: Sequence[np.ndarray], labels: np.ndarray, config: DataConfig) -> None:
    sizes = [len(part) for part in parts]
    natural = config.partitioner in BY_NATURE
    smallest = min(range(len(parts)), key=lambda p: len(parts[p]) or (len(labels) if natural else 0))
    if sizes[smallest] < config.min_partition_size:
        raise ConfigError(
            f"data.min-partition-size = {config.min_partition_size}: partition {smallest} of {len(parts)} "
            f"({config.partitioner}) has {sizes[smallest]} examples"
        )
    if sum(sizes) < len(labels):
        left_out = sorted(set(labels.tolist()) - set(labels[np.concatenate(parts)].tolist()))
        raise ConfigError(
            f"data.classes-per-partition = {config.classes_per_partition}: {len(parts)} partitions leave out "
            f"labels {', '.join(map(str, left_out))}; raise it, or use data.partitioner = 'shard'"
        )


def _natural_clients(
    train: Dataset, config: DataConfig, seed: int, known: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, int]:
    """The client of each example under ``natural``, shape (examples,), and the number of clients."""
    values, num_values = _natural_values(train, config, known)
    count = config.num_partitions or num_values
    rng = stream(seed, "partition-natural")
    if count == num_values:
        return values, count
    if count > num_values:
        groups = _codes(train, "group") if "group" in train.column_names else values
        enough = len(np.unique(np.stack([values, groups]), axis=1).T) >= count
        return _deal(values, groups if enough else np.arange(len(values)), count, rng), count
    _, first, present = np.unique(values, return_index=True, return_inverse=True)
    domains = _codes(train, "domain") if "domain" in train.column_names else np.zeros_like(values)
    return _deal(domains[first][present], values, count, rng), count


def _codes(train: Dataset, column: str) -> np.ndarray:
    if column not in train.column_names:
        raise ConfigError(f"data.partition-by = {column!r}: no such column, accepted are domain and group")
    values = train[column][:]
    return codes_of(values, in_order(map(str, values)))


def _deal(boxes: np.ndarray, units: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Deal units to ``count`` clients so that a client stays within one box; shape (examples,).

    Every box gets about the same number of clients, but not more than it has units. A unit goes
    whole to the client of its box that has least so far, large ones first. With fewer clients than
    boxes, whole boxes are dealt.
    """
    boxes = np.unique(boxes, return_inverse=True)[1]
    if count <= boxes.max():
        boxes, units = np.zeros_like(boxes), boxes
    pairs, inverse, sizes = np.unique(
        np.stack([boxes, units]), axis=1, return_inverse=True, return_counts=True
    )
    shares = _shares(np.bincount(pairs[0]), np.bincount(boxes), count)
    starts = np.cumsum([0, *shares]).tolist()
    clients = np.empty(len(sizes), dtype=np.int64)
    for box, (start, end) in enumerate(pairwise(starts)):
        loads = [(0, client) for client in range(start, end)]
        members = rng.permutation(np.flatnonzero(pairs[0] == box))
        for unit in members[np.argsort(-sizes[members], kind="stable")]:
            load, client = loads[0]
            clients[unit] = client
            heapq.heapreplace(loads, (load + int(sizes[unit]), client))
    dealt: np.ndarray = clients[inverse]
    return dealt


def _shares(num_units: np.ndarray, num_examples: np.ndarray, count: int) -> list[int]:
    """Number of clients for each box, ``count`` in all: even, capped by its units, the larger box first."""
    shares = [0] * len(num_units)
    queue = [(0, -int(size), box) for box, size in enumerate(num_examples)]
    heapq.heapify(queue)
    for _ in range(count):
        share, size, box = heapq.heappop(queue)
        shares[box] = share + 1
        if shares[box] < num_units[box]:
            heapq.heappush(queue, (share + 1, size, box))
    return shares


def _why(error: ValueError, config: DataConfig) -> str:
    if config.partitioner == "dirichlet":
        return (
            f"every draw left a client with fewer than data.min-partition-size = {config.min_partition_size} "
            f"examples; raise data.dirichlet-alpha = {config.dirichlet_alpha} or ask for fewer clients"
        )
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")
