"""Schedule of a round: groups of clients and their order, by the messages, never by the actors.

Bits depend on what is batched together, so that a run must not cut its cohorts by how many actors there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

from flwr.app import Message, MessageType

from clients.privacy import mechanism_of
from clients.runtime import ClientRuntime
from clients.training.batched.cohort_size import cohort_size
from clients.training.batched.self_check import why_apart
from clients.training.batches import num_steps
from fedlora.config import RunConfig, read_config
from fedlora.models import pick_device
from fedlora.prepared.cache import Prepared
from strategies.sampling import clients_of_round

Work: TypeAlias = Callable[[int], float]
"""What the training of a partition costs, in any unit."""


def equal_work(partition_id: int) -> float:
    """Every partition costs the same."""
    return 1.0


def predicted_work(config: RunConfig, data: Prepared) -> Work:
    """Tokens that a partition trains on in one round, before padding."""
    expected = mechanism_of(config).draws_batches
    times = 2 if config.lora.personal_rank else 1  # a second adapter trains as long as the first

    @cache
    def work(partition_id: int) -> float:
        held, train = data.indices(partition_id), config.train_of(partition_id)
        steps = num_steps(train, len(held), config.local_steps_of(partition_id))
        batch = train.batch_size if expected else min(train.batch_size, len(held))
        return float(times * steps * batch * data.train.lengths_of(held).mean())

    return work


def cohorts(
    messages: Sequence[Message], partition_ids: Mapping[int, int], size: int, work: Work
) -> list[list[Message]]:
    """The messages in groups of at most ``size``, the most work first; only training is grouped.

    Groups are of even size and hold clients of similar work.

    Args:
        messages: in any order, which does not matter.
        partition_ids: partition id by node id.
        size: 1 or more.
        work: the predicted work of a partition.
    """
    ids = [partition_ids[message.metadata.dst_node_id] for message in messages]
    order = sorted(range(len(ids)), key=lambda i: (-work(ids[i]), ids[i]))
    ordered = [messages[i] for i in order]
    together = [m for m in ordered if m.metadata.message_type.startswith(MessageType.TRAIN)]
    alone = [[m] for m in ordered if not m.metadata.message_type.startswith(MessageType.TRAIN)]
    count = -(-len(together) // size)
    cuts = [len(together) * i // count for i in range(count + 1)] if count else [0]
    return [together[a:b] for a, b in pairwise(cuts)] + alone


def with_cohort_size(config: RunConfig, path: Path, runtime: ClientRuntime | None = None) -> RunConfig:
    """The configuration with a number in place of ``engine.cohort-size = 0``.

    A run that was begun keeps its number, because its bits depend on it.

    Args:
        config: of a run.
        path: its directory.
        runtime: the run's model and data; None where the run was begun before.
    """
    if config.engine.cohort_size:
        return config
    written = path / "config.toml"
    if written.exists():
        size = read_config(written).engine.cohort_size or 1  # 0: by another engine, which trains one by one
    else:
        assert runtime is not None
        size = _chosen(config, runtime)
    return replace(config, engine=replace(config.engine, cohort_size=size))


def _chosen(config: RunConfig, runtime: ClientRuntime) -> int:
    clients = len(config.partition_list) or len(runtime.data.clients)
    head = runtime.model.initial_head.values() if config.model.head != "freeze" else ()
    device = config.engine.device
    size = cohort_size(
        config,
        runtime.model.modules,
        sum(tensor.numel() for tensor in head),
        clients_of_round(config.fraction_train, clients, config.min_train_nodes),
        pick_device("auto").type if device == "auto" else device,
    )
    return 1 if size > 1 and why_apart(runtime.model, runtime.data.pad_token_id) else size
