"""Executes instructions of several clients: whoever fits into a cohort trains in it, the rest alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

from clients.budget import PlannedRelease
from clients.control import off_gradients
from clients.execute import (
    answer,
    declined,
    gather_parts,
    load,
    modules_of,
    plan_of,
    seed_of,
    stage_of,
    train_instruction,
)
from clients.node import Node
from clients.personal import keep_second, own_steps, second_member
from clients.runtime import ClientRuntime
from clients.store import ResolvedInstruction
from clients.training.batched.layers import why_alone
from clients.training.batched.members import Member
from clients.training.batched.oom_retry import train_with_retry
from clients.training.batched.self_check import check_cohort
from clients.training.batched.train import BatchSettings
from clients.training.batches import num_steps
from clients.training.optimizers.registry import NOTHING
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.adapters import lora_set, tensor_names
from fedlora.errors import BudgetExceeded, ConfigError, LedgerRefused
from fedlora.privacy.types import PrivacySpent


@dataclass(frozen=True, slots=True)
class Assignment:
    """Instruction to train, by whom, and with what model and data."""

    runtime: ClientRuntime
    instruction: wire.TrainInstruction
    config: RunConfig
    node: Node


Answer: TypeAlias = wire.Reply | Exception
"""A client's reply, or what its own message alone would have raised."""


@dataclass(slots=True)
class Ready:
    """Client whose parts are all here.

    Attributes:
        place: of its assignment and its answer.
        assignment: what it has to do.
        resolved: what it starts from.
        plan, spent: where it is private, its release and what it has spent with it.
    """

    place: int
    assignment: Assignment
    resolved: ResolvedInstruction
    plan: PlannedRelease | None = None
    spent: PrivacySpent | None = None

    @property
    def partition_id(self) -> int:
        return self.assignment.node.partition_id


def train_instructions(assignments: Sequence[Assignment]) -> list[Answer]:
    """An answer to each assignment, in their order; one client's failure leaves the others alone.

    Clients train together that have the same run, base, trained factors, rates and data; in a cohort of one a
    client trains as by `train_instruction`.
    """
    answers: dict[int, Answer] = {}
    groups: dict[Any, list[Ready]] = {}
    for place, one in enumerate(assignments):
        try:
            resolved = gather_parts(one.runtime, one.instruction, one.config, one.node)
        except Exception as error:
            answers[place] = error
            continue
        if isinstance(resolved, wire.Reply):
            answers[place] = resolved
            continue
        key = _key(one, resolved) if _fits(one.runtime) else place
        groups.setdefault(key, []).append(Ready(place, one, resolved))
    for group in groups.values():
        if len(group) == 1:
            answers[group[0].place] = _alone(group[0].assignment)
        else:
            answers |= _together(group[0].assignment.runtime, group)
    return [answers[place] for place in range(len(assignments))]


def _key(one: Assignment, resolved: ResolvedInstruction) -> tuple[Any, ...]:
    tensors = tensor_names(resolved.adapters)
    run = (one.config, id(one.runtime), one.node.simulation, one.instruction.server_round)
    train = one.config.train_of(one.node.partition_id)
    return (*run, train, one.instruction.needs.base, one.instruction.trained, tensors)


def _fits(runtime: ClientRuntime) -> bool:
    reason = why_alone(runtime.model)
    if reason:
        _say_alone(reason)
    return not reason


@cache
def _say_alone(reason: str) -> None:
    logging.getLogger("fedlora").warning("engine.cohort-size: clients train one by one, %s", reason)


def _alone(one: Assignment) -> Answer:
    try:
        return train_instruction(one.runtime, one.instruction, one.config, one.node)
    except Exception as error:
        return error


def _together(runtime: ClientRuntime, group: Sequence[Ready]) -> dict[int, Answer]:
    """The answers of clients that train in one cohort, by place."""
    answers: dict[int, Answer] = {}
    config = group[0].assignment.config
    try:
        runtime.move_to(group[0].assignment.instruction.needs.base, group[0].resolved.patch)
        group = _able(runtime, group, answers)
        if not group:
            return answers
        first = group[0]
        load(runtime, first.resolved, first.assignment.instruction, config)
        check_cohort(
            runtime.model, runtime.data.pad_token_id, None if first.plan is None else first.plan.mechanism
        )
        group = _charged(group, answers)
        members = [_member(runtime, ready) for ready in group]
        results, halved = (
            train_with_retry(runtime.model, members, _task(runtime, first.assignment))
            if members
            else ([], False)
        )
        if config.lora.personal_rank and members:
            halved |= _train_second(runtime, group, members)
    except Exception as error:  # nobody's own: the model, the base, memory
        return answers | {ready.place: error for ready in group if ready.place not in answers}
    for ready, result in zip(group, results, strict=True):
        one = ready.assignment
        if ready.plan is not None:
            ready.plan.released()
        answers[ready.place] = answer(
            ready.resolved, one.instruction, config, one.node, result, ready.spent, halved=halved
        )
    return answers


def _train_second(runtime: ClientRuntime, group: Sequence[Ready], members: Sequence[Member]) -> bool:
    """Train and keep the second adapters of clients that have done their part; whether memory ran out."""
    first, server_round = group[0].assignment, group[0].assignment.instruction.server_round
    seconds = [
        second_member(runtime, ready.resolved, first.config, member, ready.partition_id, server_round)
        for ready, member in zip(group, members, strict=True)
    ]
    task = _task(runtime, first)
    results, halved = train_with_retry(runtime.model, seconds, replace(task, config=own_steps(task.config)))
    for ready, result in zip(group, results, strict=True):
        keep_second(ready.resolved.store, ready.partition_id, server_round, result.adapters)
    return halved


def _able(runtime: ClientRuntime, group: Sequence[Ready], answers: dict[int, Answer]) -> list[Ready]:
    """Those whose values fit and, where they are private, whose release is decided; errors of the others."""
    able = []
    cohort = [ready.partition_id for ready in group]
    for ready in group:
        one = ready.assignment
        try:
            runtime.model.check(ready.resolved.adapters, ready.resolved.head)
            num_steps(
                one.config.train_of(ready.partition_id), len(runtime.data.indices(ready.partition_id)), 1
            )
            if one.config.model.head == "freeze" and not (
                one.instruction.trained and modules_of(one.instruction)
            ):
                raise ConfigError(NOTHING)
            ready.plan = plan_of(runtime, ready.resolved, one.instruction, one.config, one.node, cohort)
        except LedgerRefused as error:
            answers[ready.place] = declined(error, one.instruction, one.node)
        except Exception as error:
            answers[ready.place] = error
        else:
            able.append(ready)
    return able


def _charged(group: Sequence[Ready], answers: dict[int, Answer]) -> list[Ready]:
    """Those whose ledger has taken the release; each is on disk before anybody trains."""
    charged = []
    for ready in group:
        one = ready.assignment
        try:
            ready.spent = None if ready.plan is None else ready.plan.reserve()
        except (BudgetExceeded, LedgerRefused) as error:
            answers[ready.place] = declined(error, one.instruction, one.node)
        except Exception as error:
            answers[ready.place] = error
        else:
            charged.append(ready)
    return charged


def _member(runtime: ClientRuntime, ready: Ready) -> Member:
    one, indices = ready.assignment, runtime.data.indices(ready.partition_id)
    config, plan = one.config, ready.plan
    private = plan is not None and plan.mechanism is not None
    train, steps = config.train_of(ready.partition_id), config.local_steps_of(ready.partition_id)
    return Member(
        adapters=lora_set(ready.resolved.adapters),
        head=ready.resolved.head,
        trained=one.instruction.trained,
        modules=modules_of(one.instruction),
        train_head=config.model.head != "freeze",
        tail=one.instruction.tail,
        control=off_gradients(
            runtime, ready.resolved, one.instruction.server_round, config, ready.partition_id
        ),
        indices=indices,
        steps=steps if private else num_steps(train, len(indices), steps),
        seed=seed_of(one.instruction, config, one.node),
        mechanism=None if plan is None else plan.mechanism,
        canaries=one.node.canaries,
        sample_rate=plan.release.sample_rate if plan is not None and private else None,
    )


def _task(runtime: ClientRuntime, one: Assignment) -> BatchSettings:
    """Settings of a whole cohort, by one of it."""
    config = one.config
    return BatchSettings(
        examples=runtime.data.train,
        pad_token_id=runtime.data.pad_token_id,
        config=config.train_of(one.node.partition_id),
        dropout=config.lora.dropout,
        release_loss=config.privacy.release_metrics,
        stage=stage_of(one.instruction, config),
    )
