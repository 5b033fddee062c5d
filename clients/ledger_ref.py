"""Ledgers of the clients' examples, and whether a run may begin on those that are there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clients.store import run_key
from clients.training.batches import Indices
from fedlora.config import RunConfig
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError, LedgerRefused
from fedlora.prepared.cache import Prepared
from fedlora.privacy.cut import ROWS, Cut
from fedlora.privacy.datasets import Dataset
from fedlora.privacy.ledger import Ledger
from fedlora.tasks import task_named
from fedlora.wire import TrainInstruction

if TYPE_CHECKING:
    from clients.node import Node

LEDGER = "ledger"
DEALT_BY = (
    "test", "test_fraction", "validation_fraction", "label_column", "group_column", "domain_column",
    "partitioner", "partition_by", "num_partitions", "dirichlet_alpha", "classes_per_partition",
    "min_partition_size",
)  # fmt: skip
"""Keys of ``data`` that decide which examples a partition has."""
OPEN_LEDGERS = 256
"""Ledgers that a process keeps open; one that is not is read anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRef:
    """Location of a client's ledger.

    Attributes:
        directory: the ledger directory.
        run_key: names the run.
        known_head: a head that the client's ledger had, as the server remembers it; empty if it does not.
        max_epsilon, max_delta: the owner's limits, whatever the run's target is.
        set_aside: what of it is kept for evaluations.
    """

    directory: Path
    run_key: str
    known_head: str = ""
    max_epsilon: float = math.inf
    max_delta: float = 1.0
    set_aside: float = 0.0


def ledger_ref_of(config: RunConfig, instruction: TrainInstruction, node: Node) -> LedgerRef:
    """Location of a node's ledger, for the run of an instruction.

    Raises:
        LedgerRefused: see `ledger_directory`.
    """
    return LedgerRef(
        directory=ledger_directory(config, node.state_dir, simulation=node.simulation),
        run_key=run_key(instruction),
        known_head=str(instruction.config.get("ledger-head", "")),
        max_epsilon=node.max_epsilon,
        max_delta=node.max_delta,
        set_aside=node.set_aside,
    )


def ledger_directory(config: RunConfig, state_dir: Path, *, simulation: bool) -> Path:
    """``privacy.ledger`` in simulation, else a place of the node's own, which outlives runs.

    Raises:
        LedgerRefused: a run in deployment that says where the node's ledger is.
    """
    if not config.privacy.ledger:
        return state_dir / LEDGER
    if not simulation:
        raise LedgerRefused(
            f"privacy.ledger = {config.privacy.ledger!r}: only for fedlora run, a node has its own ledger"
        )
    return Path(config.privacy.ledger).expanduser().absolute()


def ledger_of(directory: Path, config: RunConfig, data: Prepared, partition_id: int) -> Ledger:
    """The ledger of one client's examples."""
    source, partitioning, part = (data.declared, "", "") if data.declared else name_of(config, partition_id)
    dataset = Dataset(
        source=source,
        partitioning=partitioning,
        part=part,
        fingerprint=fingerprint(data.train, data.indices(partition_id)),
        cut=None if data.declared else cut_before_dealt(config, data),
    )
    return _ledger(directory, dataset)


_ledger = lru_cache(maxsize=OPEN_LEDGERS)(Ledger)


def name_of(config: RunConfig, partition_id: int) -> tuple[str, str, str]:
    """Data set, partitioning and part, by configuration alone; ``privacy.dataset-id`` if it is declared."""
    data = config.data
    path = Path(data.name).expanduser()
    name = str(path.resolve()) if path.exists() else data.name
    source = config.privacy.dataset_id or ":".join(filter(None, (name, data.subset)))
    dealt = {key: value for key, value in dataclasses.asdict(data).items() if key in DEALT_BY}
    if _dealt_by_place(config):
        dealt["seed"] = config.seed
    digest = hashlib.sha256(json.dumps(dealt, sort_keys=True).encode()).hexdigest()
    return source, digest[:12], f"partition-{partition_id}"


def _dealt_by_place(config: RunConfig) -> bool:
    """Whether who has an example depends on how many there are, and not on its own row alone."""
    return config.data.partitioner != "natural" or config.data.num_partitions > 0


def cut_before_dealt(config: RunConfig, data: Prepared) -> Cut | None:
    """What made the examples that were dealt; None where each goes where its row belongs."""
    if not _dealt_by_place(config):
        return None
    return ROWS if task_named(config.task).keeps_rows else _cut(config, data)


def example_of(config: RunConfig, data: Prepared) -> Cut | None:
    """What one example is, which a release protects; None where a column's values are protected."""
    if config.privacy.unit_column:
        return None
    by = task_named(config.task).cut_by(config.data)
    whole = _cut(config, data).record()
    return Cut(**{name: value for name, value in whole.items() if name in by})


def _cut(config: RunConfig, data: Prepared) -> Cut:
    digest = hashlib.sha256(data.reader.encode()).hexdigest()[:12]
    return Cut(task=config.task, max_length=config.data.max_length, tokenizer=digest)


def fingerprint(examples: Examples, indices: Indices) -> str:
    """A digest of some examples: tokens, labels, what counts of them and whose they are, in their order."""
    starts, lengths = examples.offsets[indices], examples.lengths[indices]
    places = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    h = hashlib.sha256()
    more = [] if examples.counted is None else [examples.counted[places]]
    if examples.splits is not None:
        more.append(examples.splits[indices] - starts)
    if examples.targets is not None:
        more.append(examples.targets[indices])
    if examples.units is not None:
        more.append(np.unique(examples.units[indices], return_inverse=True)[1])
    for numbers in (lengths, examples.labels[indices], examples.tokens[places], *more):
        h.update(np.ascontiguousarray(numbers).tobytes())
    return h.hexdigest()


def check_ledgers(
    config: RunConfig, data: Prepared, partitions: Collection[int], directory: Path, heads: Mapping[int, str],
    unit: str, cut: Cut | None = None,
) -> None:  # fmt: skip
    """Before a run: every client's ledger is there or can be resolved, and continues from its known head.

    Raises:
        LedgerRefused: the first that is not so.
    """
    for partition in sorted(partitions):
        ledger = ledger_of(directory, config, data, partition)
        ledger.check(heads.get(partition, ""), unit, cut)


def check_disjoint(config: RunConfig, data: Prepared, partitions: Collection[int]) -> None:
    """Before a private run: no example is at two clients, where its privacy would be spent twice.

    Raises:
        ConfigError: two partitions share examples.
    """
    owner = np.full(len(data.train), -1)
    for partition in sorted(partitions):
        indices = data.indices(partition)
        shared = owner[indices] >= 0
        if shared.any():
            raise ConfigError(
                f"data.partitioner = {config.data.partitioner!r}: partitions {owner[indices][shared][0]} and "
                f"{partition} share {int(shared.sum())} examples; under privacy each belongs to one client"
            )
        owner[indices] = partition


@lru_cache(maxsize=8)
def say_spread(units: int, most: int, column: str) -> None:
    """Log, once in a process, that units have examples at several clients."""
    logging.getLogger("fedlora").warning(
        "privacy.unit-column = %r: %d units have examples at several clients (up to %d); each client's "
        "epsilon holds for what a unit has there, not for all clients together", column, units, most,
    )  # fmt: skip


def warn_of_spread(config: RunConfig, data: Prepared, partitions: Collection[int]) -> None:
    """Say whether what a client hides of a unit is all of it."""
    if data.train.units is None:
        return
    held = [np.unique(data.train.units[data.indices(partition)]) for partition in partitions]
    clients = np.unique(np.concatenate(held), return_counts=True)[1]
    if (clients > 1).any():
        say_spread(int((clients > 1).sum()), int(clients.max()), config.privacy.unit_column)
