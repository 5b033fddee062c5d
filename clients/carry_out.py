"""One client's answer to one order: hold what it needs, set up the model, train or evaluate, reply."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clients.accounts import Books, ledger_directory
from clients.batches import Indices
from clients.budget import Plan, plan_release, train_within_budget
from clients.canaries import Canaries
from clients.evaluation import evaluate
from clients.holdings import OWN, Holdings
from clients.orders import Opened, open_order
from clients.packed import packed_base
from clients.resident import Resident, resident
from clients.training import LocalResult, train_local
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.data.examples import evaluation_subset
from fedlora.data.own import OwnData
from fedlora.data.prepared import Prepared
from fedlora.errors import BudgetExceeded, ConfigError, LedgerRefused
from fedlora.privacy.types import PrivacySpent
from fedlora.seeding import derive
from fedlora.updates import digest

NUM_EXAMPLES, TRAIN_LOSS = "num-examples", "train-loss"
NUM_UNITS = "num-units"
"""What was judged, where that is not the examples."""
ACCURACY_IN, EXAMPLES_IN = "accuracy-in-domain-", "examples-in-domain-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Where an order is carried out.

    Attributes:
        partition_id: whose data is trained on.
        state_dir: what this machine keeps between messages.
        simulation: this process belongs to a simulation, so that privacy's randomness may be seeded.
        canaries: what an audit hides among the client's examples, in private training.
        own: the machine's own examples, where it does not train on the run's.
        max_epsilon: the owner's limit on what is ever spent on them.
    """

    partition_id: int
    state_dir: Path
    simulation: bool = False
    canaries: Canaries | None = None
    own: OwnData | None = None
    max_epsilon: float = math.inf


def train_order(order: wire.TrainOrder, config: RunConfig, node: Node) -> wire.Reply:
    """The reply to an order to train."""
    ready = set_up(order, config, node)
    if isinstance(ready, wire.Reply):
        return ready
    worker, opened = ready
    load(worker, opened, order, config)
    try:
        result, spent = _train(worker, opened, order, config, node)
    except (BudgetExceeded, LedgerRefused) as error:
        return declined(error, order, node)
    return answer(opened, order, config, node, result, spent)


def answer(
    opened: Opened,
    order: wire.TrainOrder,
    config: RunConfig,
    node: Node,
    result: LocalResult,
    spent: PrivacySpent | None,
    *,
    halved: bool = False,
) -> wire.Reply:
    """The reply of a client that has trained; it keeps what is its own.

    Args:
        opened: what it started from.
        order: what it was asked for.
        config: the run.
        node: where.
        result: what it has now.
        spent: what it has spent; None where it trained without privacy.
        halved: it trained in a smaller cohort than was meant, see `clients.cohort.halving`.
    """
    modules, local = modules_of(order), config.model.head == "local"
    own = wire.to_peft(result.adapters, result.head if local else {}, order.trains - order.ships, modules)
    if own:
        opened.holdings.keep_personal(node.partition_id, OWN, order.server_round, own)
    shared = result.head if config.model.head == "train" else {}
    metrics: dict[str, float] = {}
    if result.loss is not None:
        metrics = {NUM_EXAMPLES: float(result.num_examples), TRAIN_LOSS: result.loss}
    return wire.Reply(
        status=wire.OK,
        arrays=wire.to_peft(result.adapters, shared, order.ships, modules),
        metrics=metrics,
        holds=order.needs.digests,
        privacy=None if spent is None else spent.told(count=config.privacy.release_metrics),
        cohort_halved=halved,
    )


def declined(error: BudgetExceeded | LedgerRefused, order: wire.TrainOrder, node: Node) -> wire.Reply:
    """The reply of a client that does not train; where its files lie is for the log of its own machine."""
    reason = str(error)
    if isinstance(error, LedgerRefused) and not node.simulation:
        logging.getLogger("fedlora").warning("round %d: %s", order.server_round, reason)
        reason = "the node's privacy ledger refuses; its own log says why"
    return wire.Reply(status=wire.DECLINED, reason=reason)


def evaluate_order(order: wire.TrainOrder, config: RunConfig, node: Node) -> wire.Reply:
    """The reply to an order to evaluate: this client's model on the test examples of its own domains.

    The fixed subset of them, and all of them after the last round.
    """
    ready = set_up(order, config, node, after_round=True)
    if isinstance(ready, wire.Reply):
        return ready
    worker, opened = ready
    worker.model.load(opened.adapters, opened.head)
    last = order.server_round == config.num_server_rounds
    chosen = evaluation_subset(worker.data.test, 0 if last else config.data.evaluate_examples)
    own = np.intersect1d(chosen, own_test_indices(worker.data, node.partition_id))
    outcome = evaluate(worker.model, worker.data.test, own, worker.data.pad_token_id)
    metrics = {NUM_EXAMPLES: float(outcome.num_examples), "accuracy": outcome.accuracy, "loss": outcome.loss}
    if not worker.model.task.labelled:
        metrics[NUM_UNITS] = float(outcome.num_units)
    for domain, results in outcome.by_domain().items():
        metrics[f"{ACCURACY_IN}{domain}"] = results.accuracy
        metrics[f"{EXAMPLES_IN}{domain}"] = float(results.num_units)
    return wire.Reply(status=wire.OK, metrics=metrics, holds=order.needs.digests)


def set_up(
    order: wire.TrainOrder, config: RunConfig, node: Node, *, after_round: bool = False
) -> tuple[Resident, Opened] | wire.Reply:
    """This process's model with its base where the order wants it, or the reply that says what is missing.

    Raises:
        ConfigError: the partition does not exist in the data.
        UpdateRefused: a part does not have the content that its digest promises.
    """
    ready = gather_parts(order, config, node, after_round=after_round)
    if not isinstance(ready, wire.Reply):
        worker, opened = ready
        worker.move_to(order.needs.base, opened.patch)
    return ready


def gather_parts(
    order: wire.TrainOrder, config: RunConfig, node: Node, *, after_round: bool = False
) -> tuple[Resident, Opened] | wire.Reply:
    """As `set_up`, with the base left where it is."""
    worker = resident(config, node.own)
    worker.model.precision = getattr(torch, config.train.precision)
    worker.model.checkpointing = config.train.gradient_checkpointing
    count = worker.data.num_partitions
    if not 0 <= node.partition_id < count:
        raise ConfigError(f"partition-id = {node.partition_id}: the data has partitions 0 to {count - 1}")
    if node.partition_id in worker.data.left_out:
        raise ConfigError(f"partition-id = {node.partition_id}: {worker.data.left_out[node.partition_id]}")
    opened = open_order(order, Holdings(node.state_dir / run_key(order)))
    if isinstance(opened, wire.Reply):
        return opened
    before = order.server_round + 1 if after_round else order.server_round
    own = opened.holdings.personal(node.partition_id, OWN, before)
    return worker, opened if own is None else opened.with_own(own)


def load(worker: Resident, opened: Opened, order: wire.TrainOrder, config: RunConfig) -> frozenset[str]:
    """Make the model ready to train as ordered; returns the modules whose factors it trains."""
    modules = modules_of(order)
    worker.model.load(
        opened.adapters,
        opened.head,
        trains=order.trains,
        modules=modules,
        dropout=config.lora.dropout,
        train_head=config.model.head != "freeze",
        tail=order.tail,
    )
    return modules


def modules_of(order: wire.TrainOrder) -> frozenset[str]:
    """The modules whose factors a client trains."""
    return frozenset(json.loads(order.config["modules"]))


def run_key(order: wire.TrainOrder) -> str:
    """What names the run at its clients."""
    return str(order.config.get("run-key", "run"))


def own_test_indices(data: Prepared, partition_id: int) -> Indices:
    """The test examples of the domains that a client holds; all of them where there are no domains."""
    if not data.domain_names:
        return np.arange(len(data.test))
    held = np.unique(data.train.domains[data.indices(partition_id)])
    return np.flatnonzero(np.isin(data.test.domains, held))


def seed_of(order: wire.TrainOrder, config: RunConfig, node: Node) -> int:
    """A client's own seed of one round."""
    return derive(config.seed, "client", order.server_round, node.partition_id)


def plan_of(
    worker: Resident,
    opened: Opened,
    order: wire.TrainOrder,
    config: RunConfig,
    node: Node,
    cohort: Sequence[int] = (),
) -> Plan:
    """What a private client is about to release; ``cohort`` as in `plan_release`."""
    books = Books(
        directory=ledger_directory(config, node.state_dir, simulation=node.simulation),
        run_key=run_key(order),
        known_head=str(order.config.get("ledger-head", "")),
        max_epsilon=node.max_epsilon,
    )
    return plan_release(
        worker,
        config,
        books,
        partition_id=node.partition_id,
        server_round=order.server_round,
        local_steps=config.local_steps_of(node.partition_id),
        seed=seed_of(order, config, node) if node.simulation else None,
        start=_start(order, opened) if node.simulation else "",
        cohort=cohort,
    )


def _train(
    worker: Resident, opened: Opened, order: wire.TrainOrder, config: RunConfig, node: Node
) -> tuple[LocalResult, PrivacySpent | None]:
    seed = seed_of(order, config, node)
    if config.privacy.private:
        plan = plan_of(worker, opened, order, config, node)
        return train_within_budget(
            worker, plan, seed=seed if node.simulation else None, canaries=node.canaries
        )
    with packed_base(worker.model, worker.model.precision):
        result = train_local(
            worker.model,
            worker.data.train,
            worker.data.indices(node.partition_id),
            worker.data.pad_token_id,
            config.train,
            local_steps=config.local_steps_of(node.partition_id),
            seed=seed,
        )
    return result, None


def _start(order: wire.TrainOrder, opened: Opened) -> str:
    """A digest of what training starts from: base, adapter, head, what of them is trained, and how."""
    factors = {f"{name}.{x}": t for name, f in opened.adapters.items() for x, t in f.tensors().items()}
    values = [digest(factors), digest(opened.head)]
    settings = [order.config["scaling"], order.needs.base, sorted(order.trains), order.config["modules"]]
    tail = [] if order.tail is None else [order.tail.weight, order.tail.start]
    return json.dumps([*values, *settings, *tail])
