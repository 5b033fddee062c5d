"""Executes one instruction of one client: hold what it needs, set up the model, train or evaluate, reply."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from clients.budget import PlannedRelease, train_within_budget
from clients.control import keep_control, off_gradients
from clients.node import Node
from clients.personal import train_second
from clients.privacy import mechanism_of
from clients.runtime import ClientRuntime
from clients.store import OWED, OWN, ClientStore, ResolvedInstruction, resolve, run_key
from clients.training.forward import moves
from clients.training.packing_check import check_packing
from clients.training.pass_memory import with_passes
from clients.training.schedule import Stage
from clients.training.train import LocalResult, train_local
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.base_patches import digest
from fedlora.core.directions import most_changed
from fedlora.core.factors import Tensors
from fedlora.core.seeding import derive
from fedlora.errors import BudgetExceeded, ConfigError, LedgerRefused
from fedlora.models.packed_linear import packed_base
from fedlora.privacy.types import PrivacySpent

NUM_EXAMPLES, TRAIN_LOSS = "num-examples", "train-loss"
NUM_UNITS = "num-units"
"""What was judged, where that is not the examples."""
ACCURACY_IN, EXAMPLES_IN = "accuracy-in-domain-", "examples-in-domain-"


def train_instruction(
    runtime: ClientRuntime, instruction: wire.TrainInstruction, config: RunConfig, node: Node
) -> wire.Reply:
    """The reply to an instruction to train."""
    resolved = set_up(runtime, instruction, config, node)
    if isinstance(resolved, wire.Reply):
        return resolved
    control = off_gradients(runtime, resolved, instruction.server_round, config, node.partition_id)
    load(runtime, resolved, instruction, config, control)
    try:
        result, spent = _train(runtime, resolved, instruction, config, node)
    except (BudgetExceeded, LedgerRefused) as error:
        return declined(error, instruction, node)
    if config.lora.personal_rank:
        train_second(runtime, resolved, config, node.partition_id, instruction.server_round)
    return answer(resolved, instruction, config, node, result, spent)


def answer(
    resolved: ResolvedInstruction,
    instruction: wire.TrainInstruction,
    config: RunConfig,
    node: Node,
    result: LocalResult,
    spent: PrivacySpent | None,
    *,
    halved: bool = False,
) -> wire.Reply:
    """The reply of a client that has trained; it keeps what is its own.

    Args:
        resolved: what it started from.
        instruction: what it was asked for.
        config: the run.
        node: where.
        result: what it has now.
        spent: what it has spent; None where it trained without privacy.
        halved: it trained in a smaller cohort than was meant, see `clients.training.batched.oom_retry`.
    """
    if most := instruction.choose:
        result = replace(result, adapters=most_changed(resolved.adapters, result.adapters, most))
    modules, local = modules_of(instruction), config.model.head == "local"
    kept = instruction.trained - instruction.uploaded
    own = wire.to_peft(result.adapters, result.head if local else {}, kept) if kept or local else {}
    if own:
        resolved.store.keep_personal(node.partition_id, OWN, instruction.server_round, own)
    shared = (result.head, resolved.head) if config.model.head == "train" else ({}, {})
    arrays = wire.to_peft(result.adapters, shared[0], instruction.uploaded, modules)
    start = wire.to_peft(resolved.adapters, shared[1], instruction.uploaded, modules)
    if config.train.control_variates:
        keep_control(resolved.store, node.partition_id, instruction.server_round, start, arrays)
    if instruction.codec.feedback:
        owed = resolved.store.personal(node.partition_id, OWED, instruction.server_round) or {}
        arrays = wire.with_owed(arrays, owed)
        owed |= instruction.left_out(start, arrays)
        resolved.store.keep_personal(node.partition_id, OWED, instruction.server_round, owed)
    count, loss = float(result.num_examples), result.loss
    metrics = {} if loss is None else {NUM_EXAMPLES: count, TRAIN_LOSS: loss}
    written: Tensors = {}
    if instruction.codec.of_steps:
        assert result.slopes is not None, "validated: train.gradient is 'forward'"
        told = moves(config.train_of(node.partition_id), result.slopes, stage_of(instruction, config))
        written = wire.written(seed_of(instruction, config, node), told)
    return wire.Reply(
        status=wire.OK,
        arrays=arrays,
        written=written,
        start=start,
        adapters=result.adapters,
        metrics=metrics,
        holds=instruction.needs.digests,
        privacy=None
        if spent is None
        else spent.told(count=config.privacy.release_metrics, simulated=node.simulation),
        cohort_halved=halved,
    )


def declined(
    error: BudgetExceeded | LedgerRefused, instruction: wire.TrainInstruction, node: Node
) -> wire.Reply:
    """The reply of a client that does not train.

    Where a node's files lie, and what other runs have spent, is for the log of its own machine.
    """
    reason = own = str(error)
    if not node.simulation:
        logging.getLogger("fedlora").warning("round %d: %s", instruction.server_round, reason)
        what = "ledger" if isinstance(error, LedgerRefused) else "budget"
        reason = f"the node's privacy {what} refuses; its own log says why"
    return wire.Reply(status=wire.DECLINED, reason=reason, own_reason=own)


def set_up(
    runtime: ClientRuntime,
    instruction: wire.TrainInstruction,
    config: RunConfig,
    node: Node,
    *,
    after_round: bool = False,
) -> ResolvedInstruction | wire.Reply:
    """Bring the base to where the instruction wants it; the reply that says what is missing, if anything is.

    Raises:
        ConfigError: the partition does not exist in the data.
        UpdateRefused: a part does not have the content that its digest promises.
    """
    resolved = gather_parts(runtime, instruction, config, node, after_round=after_round)
    if not isinstance(resolved, wire.Reply):
        runtime.move_to(instruction.needs.base, resolved.patch)
        check_received(runtime, resolved, node.largest_value)
    return resolved


def check_received(runtime: ClientRuntime, resolved: ResolvedInstruction, largest: float) -> None:
    """Refuse values that a server may have chosen so that a certain example alone overflows.

    Raises:
        UpdateRefused: a factor, scaling, value of the head, or weight of the moved base beyond the range.
    """
    if largest == math.inf:
        return
    scalings = {f"scaling of {m}": torch.tensor(float(a.scaling)) for m, a in resolved.adapters.items()}
    wire.check_range(scalings, largest)
    for module, adapter in resolved.adapters.items():
        wire.check_range({f"{name} of {module}": t for name, t in adapter.tensors().items()}, largest)
    wire.check_range(resolved.head, largest)
    wire.check_range({f"weight of {m}": t for m, t in runtime.model.base.moved_weights.items()}, largest)


def gather_parts(
    runtime: ClientRuntime,
    instruction: wire.TrainInstruction,
    config: RunConfig,
    node: Node,
    *,
    after_round: bool = False,
) -> ResolvedInstruction | wire.Reply:
    """As `set_up`, with the base left where it is."""
    runtime.model.precision = getattr(torch, config.train.precision)
    runtime.model.checkpointing = config.train.gradient_checkpointing
    count = runtime.data.num_partitions
    if not 0 <= node.partition_id < count:
        raise ConfigError(f"partition-id = {node.partition_id}: the data has partitions 0 to {count - 1}")
    if node.partition_id in runtime.data.left_out:
        raise ConfigError(f"partition-id = {node.partition_id}: {runtime.data.left_out[node.partition_id]}")
    home = node.state_dir / run_key(instruction)
    resolved = resolve(instruction, ClientStore(home, runtime.whole, config.save_total_limit + 1))
    if isinstance(resolved, wire.Reply):
        return resolved
    if node.check_start is not None:
        node.check_start(instruction, resolved)
    before = instruction.server_round + 1 if after_round else instruction.server_round
    own = resolved.store.personal(node.partition_id, OWN, before)
    return resolved if own is None else resolved.with_own(own)


def load(
    runtime: ClientRuntime,
    resolved: ResolvedInstruction,
    instruction: wire.TrainInstruction,
    config: RunConfig,
    control: Tensors | None = None,
) -> frozenset[str]:
    """Make the model ready to train as instructed; returns the modules whose factors it trains."""
    modules = modules_of(instruction)
    runtime.model.load(
        resolved.adapters,
        resolved.head,
        trained=instruction.trained,
        modules=modules,
        dropout=config.lora.dropout,
        train_head=config.model.head != "freeze",
        tail=instruction.tail,
        control=control,
    )
    return modules


def modules_of(instruction: wire.TrainInstruction) -> frozenset[str]:
    """The modules whose factors a client trains."""
    return frozenset(json.loads(instruction.config["modules"]))


def seed_of(instruction: wire.TrainInstruction, config: RunConfig, node: Node) -> int:
    """A client's own seed of one round."""
    return derive(config.seed, "client", instruction.server_round, node.partition_id)


def stage_of(instruction: wire.TrainInstruction, config: RunConfig) -> Stage:
    """Where a round stands in its run."""
    return Stage(instruction.server_round, config.num_server_rounds)


def plan_of(
    runtime: ClientRuntime,
    resolved: ResolvedInstruction,
    instruction: wire.TrainInstruction,
    config: RunConfig,
    node: Node,
    cohort: Sequence[int] = (),
) -> PlannedRelease | None:
    """Planned release of a client, where its privacy is its own; ``cohort`` as in `plan_release`."""
    seed, start = seed_of(instruction, config, node), partial(_start, instruction, resolved)
    return mechanism_of(config).local(runtime, instruction, node, seed=seed, start=start, cohort=cohort)


def _train(
    runtime: ClientRuntime,
    resolved: ResolvedInstruction,
    instruction: wire.TrainInstruction,
    config: RunConfig,
    node: Node,
) -> tuple[LocalResult, PrivacySpent | None]:
    seed = seed_of(instruction, config, node)
    plan = plan_of(runtime, resolved, instruction, config, node)
    if plan is not None and plan.mechanism is not None:
        return train_within_budget(
            runtime, plan, seed=seed if node.simulation else None, canaries=node.canaries
        )
    model, data, partition = runtime.model, runtime.data, node.partition_id
    given = data.train, data.indices(partition), data.pad_token_id
    train = with_passes(model, *given, config.train_of(partition))
    spent = None if plan is None else plan.reserve()
    if train.packing:
        check_packing(model, data.pad_token_id)
    with packed_base(model, model.precision):
        steps, stage = config.local_steps_of(partition), stage_of(instruction, config)
        result = train_local(model, *given, train, local_steps=steps, seed=seed, stage=stage)
    if plan is not None:
        plan.released()
    return result, spent


def _start(instruction: wire.TrainInstruction, resolved: ResolvedInstruction) -> str:
    """A digest of what training starts from: base, adapter, head, what of them is trained, and how."""
    factors = {f"{name}.{x}": t for name, f in resolved.adapters.items() for x, t in f.tensors().items()}
    told = instruction.config
    settings = [told["scaling"], instruction.needs.base, sorted(instruction.trained), told["modules"]]
    tail = [] if instruction.tail is None else [instruction.tail.weight, instruction.tail.start]
    return json.dumps([digest(factors), digest(resolved.head), *settings, *tail])
