"""One client's answer to one order: hold what it needs, set up the model, train or evaluate, reply."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clients.accounts import Books, ledger_directory
from clients.batches import Indices
from clients.budget import train_within_budget
from clients.canaries import Canaries
from clients.evaluation import evaluate
from clients.holdings import Holdings
from clients.orders import Opened, open_order
from clients.resident import Resident, resident
from clients.training import train_local
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.data.examples import evaluation_subset
from fedlora.data.prepared import Prepared
from fedlora.errors import BudgetExceeded, ConfigError, LedgerRefused
from fedlora.factors import AdapterSet, Tensors
from fedlora.seeding import derive
from fedlora.updates import digest

OWN = "own"
"""What a client keeps to itself: a local head, factors that it trains and does not ship."""
NUM_EXAMPLES, TRAIN_LOSS = "num-examples", "train-loss"
ACCURACY_IN, EXAMPLES_IN = "accuracy-in-domain-", "examples-in-domain-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Where an order is carried out.

    Attributes:
        partition_id: whose data is trained on.
        state_dir: what this machine keeps between messages.
        simulation: this process belongs to a simulation, so that privacy's randomness may be seeded.
        canaries: what an audit hides among the client's examples, in private training.
    """

    partition_id: int
    state_dir: Path
    simulation: bool = False
    canaries: Canaries | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What local training leaves: the values, and what the client releases about them."""

    adapters: AdapterSet
    head: Tensors
    metrics: dict[str, float]
    privacy: dict[str, object] | None = None


def train_order(order: wire.TrainOrder, config: RunConfig, node: Node) -> wire.Reply:
    """The reply to an order to train."""
    ready = set_up(order, config, node)
    if isinstance(ready, wire.Reply):
        return ready
    worker, opened = ready
    modules = load(worker, opened, order, config)
    try:
        trained = _train(worker, opened, order, config, node)
    except (BudgetExceeded, LedgerRefused) as error:
        return wire.Reply(status=wire.DECLINED, reason=str(error))
    local = config.model.head == "local"
    own = wire.to_peft(trained.adapters, trained.head if local else {}, order.trains - order.ships, modules)
    if own:
        opened.holdings.keep_personal(node.partition_id, OWN, order.server_round, own)
    shared = trained.head if config.model.head == "train" else {}
    return wire.Reply(
        status=wire.OK,
        arrays=wire.to_peft(trained.adapters, shared, order.ships, modules),
        metrics=trained.metrics,
        holds=order.needs.digests,
        privacy=trained.privacy,
    )


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
    for domain, accuracy in outcome.accuracy_by_domain().items():
        metrics[f"{ACCURACY_IN}{domain}"] = accuracy
        metrics[f"{EXAMPLES_IN}{domain}"] = float((outcome.domains == domain).sum())
    return wire.Reply(status=wire.OK, metrics=metrics, holds=order.needs.digests)


def set_up(
    order: wire.TrainOrder, config: RunConfig, node: Node, *, after_round: bool = False
) -> tuple[Resident, Opened] | wire.Reply:
    """This process's model with its base where the order wants it, or the reply that says what is missing.

    Raises:
        ConfigError: the partition does not exist in the data.
        UpdateRefused: a part does not have the content that its digest promises.
    """
    worker = resident(config)
    count = worker.data.num_partitions
    if not 0 <= node.partition_id < count:
        raise ConfigError(f"partition-id = {node.partition_id}: the data has partitions 0 to {count - 1}")
    opened = open_order(order, Holdings(node.state_dir / run_key(order)))
    if isinstance(opened, wire.Reply):
        return opened
    worker.move_to(order.needs.base, opened.patch)
    before = order.server_round + 1 if after_round else order.server_round
    own = opened.holdings.personal(node.partition_id, OWN, before)
    return worker, opened if own is None else opened.with_own(own)


def load(worker: Resident, opened: Opened, order: wire.TrainOrder, config: RunConfig) -> frozenset[str]:
    """Make the model ready to train as ordered; returns the modules whose factors it trains."""
    modules = frozenset(json.loads(order.config["modules"]))
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


def run_key(order: wire.TrainOrder) -> str:
    """What names the run at its clients."""
    return str(order.config.get("run-key", "run"))


def own_test_indices(data: Prepared, partition_id: int) -> Indices:
    """The test examples of the domains that a client holds; all of them where there are no domains."""
    if not data.domain_names:
        return np.arange(len(data.test))
    held = np.unique(data.train.domains[data.indices(partition_id)])
    return np.flatnonzero(np.isin(data.test.domains, held))


def _train(
    worker: Resident, opened: Opened, order: wire.TrainOrder, config: RunConfig, node: Node
) -> Trained:
    indices = worker.data.indices(node.partition_id)
    steps = config.local_steps_of(node.partition_id)
    seed = derive(config.seed, "client", order.server_round, node.partition_id)
    privacy: dict[str, object] | None = None
    if config.privacy.private:
        books = Books(
            directory=ledger_directory(config, node.state_dir, simulation=node.simulation),
            run_key=run_key(order),
            known_head=str(order.config.get("ledger-head", "")),
        )
        result, spent = train_within_budget(
            worker,
            config,
            books,
            partition_id=node.partition_id,
            server_round=order.server_round,
            local_steps=steps,
            seed=seed if node.simulation else None,
            start=_start(order, opened) if node.simulation else "",
            canaries=node.canaries,
        )
        privacy = spent.told(count=config.privacy.release_metrics)
    else:
        result = train_local(
            worker.model, worker.data.train, indices, worker.data.pad_token_id, config.train,
            local_steps=steps, seed=seed,
        )  # fmt: skip
    metrics: dict[str, float] = {}
    if result.loss is not None:
        metrics = {NUM_EXAMPLES: float(result.num_examples), TRAIN_LOSS: result.loss}
    return Trained(adapters=result.adapters, head=result.head, metrics=metrics, privacy=privacy)


def _start(order: wire.TrainOrder, opened: Opened) -> str:
    """A digest of what training starts from: base, adapter, head, what of them is trained, and how."""
    factors = {f"{name}.{x}": t for name, f in opened.adapters.items() for x, t in f.tensors().items()}
    values = [digest(factors), digest(opened.head)]
    settings = [order.config["scaling"], order.needs.base, sorted(order.trains), order.config["modules"]]
    tail = [] if order.tail is None else [order.tail.weight, order.tail.start]
    return json.dumps([*values, *settings, *tail])
