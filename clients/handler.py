"""Handles messages at a node: within what its owner allows, on its own data if it has any."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from logging import WARNING
from typing import Any

from flwr.app import RecordDict
from flwr.common.logger import log

from clients.execute import Node, evaluate_instruction, train_instruction
from clients.node_settings import NodeSettings, node_settings, own_of
from clients.runtime import RuntimeCache, configured
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.config.privacy import ADD_OR_REMOVE_ONE
from fedlora.core.parallel import one_thread
from fedlora.errors import ConfigError, FedLoraError, OwnDataRefused, named_line

TRAIN, EVALUATE = "train", "evaluate"


def handle(
    kind: str,
    content: RecordDict,
    run_config: Mapping[str, Any],
    node_config: Mapping[str, Any],
    runtimes: RuntimeCache,
) -> RecordDict:
    """The reply to a message.

    Args:
        kind: ``train`` or ``evaluate``.
        content: of the message.
        run_config: Flower's, of the run.
        node_config: Flower's, of the node.
        runtimes: of this process.

    Raises:
        UpdateRefused: the message is not an instruction.
    """
    simulation = bool(node_config.get("simulation", False))
    config, settings = configured(run_config), node_settings(node_config)
    instruction = wire.decode_instruction(content)
    answer = evaluate_instruction if kind == EVALUATE else train_instruction
    try:
        if kind == TRAIN:
            refuse_beyond_limit(config, settings)
        with one_thread():
            config = in_owners_name(config, settings, simulation=simulation)
            runtime = runtimes.get(config, own_of(settings, _labels(instruction)))
            reply = answer(runtime, instruction, config, _node(settings, simulation=simulation))
    except ConfigError as error:
        if simulation:
            raise
        log(WARNING, "%s", error)
        told = error.told if isinstance(error, OwnDataRefused) else str(error)
        reply = wire.Reply(status=wire.DECLINED, reason=told)
    return wire.encode_reply(reply, instruction, packed=instruction.packed)


def handle_together(
    contents: Sequence[RecordDict],
    run_configs: Sequence[Mapping[str, Any]],
    node_configs: Sequence[Mapping[str, Any]],
    runtimes: RuntimeCache,
) -> list[RecordDict | str]:
    """The replies to messages to train for several simulated nodes in this process, in their order.

    A node that fails has the first line of its error instead; the others do not notice.
    """
    from clients.execute_cohort import Assignment, train_instructions

    answers: dict[int, RecordDict | str] = {}
    assignments: dict[int, Assignment] = {}
    for place, (content, run_config, node_config) in enumerate(
        zip(contents, run_configs, node_configs, strict=True)
    ):
        try:
            config, settings = configured(run_config), node_settings(node_config)
            refuse_beyond_limit(config, settings)
            simulation = bool(node_config.get("simulation", False))
            config = in_owners_name(config, settings, simulation=simulation)
            instruction = wire.decode_instruction(content)
            runtime = runtimes.get(config, own_of(settings, _labels(instruction)))
            assignments[place] = Assignment(
                runtime, instruction, config, _node(settings, simulation=simulation)
            )
        except Exception as error:
            answers[place] = _line(error)
    with one_thread():
        replies = train_instructions(list(assignments.values()))
    for (place, assigned), reply in zip(assignments.items(), replies, strict=True):
        if isinstance(reply, wire.Reply):
            answers[place] = wire.encode_reply(reply, assigned.instruction)
        else:
            answers[place] = _line(reply)
    return [answers[place] for place in range(len(contents))]


def _line(error: Exception) -> str:
    if not isinstance(error, FedLoraError):
        logging.getLogger("fedlora").error("client failed", exc_info=error)
    return named_line(error)


def refuse_beyond_limit(config: RunConfig, settings: NodeSettings) -> None:
    """Hold a run to the owner's limit, as far as it shows before training; the ledger does the rest.

    Raises:
        ConfigError: a run that gives no guarantee for an example, or a looser one than is allowed.
    """
    if not settings.max_epsilon:
        return
    limit = f"the owner of this node allows epsilon {settings.max_epsilon:g} at delta {settings.max_delta:g}"
    if not config.privacy.private:
        raise ConfigError(f"privacy.mode = {config.privacy.mode!r}: {limit}, which takes 'example'")
    if config.privacy.target_delta > settings.max_delta:
        raise ConfigError(f"privacy.target-delta = {config.privacy.target_delta:g}: {limit}")


def in_owners_name(config: RunConfig, settings: NodeSettings, *, simulation: bool) -> RunConfig:
    """The run with the owner's name for the data and the owner's count of them, whatever the run says.

    Raises:
        ConfigError: a run that takes the count for public although the owner declares another, or that
            needs a declared one where the owner declares none.
    """
    privacy, declared = config.privacy, settings.declared_examples
    if privacy.private and (declared or not simulation):
        hidden = privacy.neighboring_relation == ADD_OR_REMOVE_ONE
        key = f"privacy.neighboring-relation = {privacy.neighboring_relation!r}"
        if declared and not hidden:
            raise ConfigError(
                f"{key}: the owner of this node declares how many examples count, which takes "
                f"{ADD_OR_REMOVE_ONE!r}"
            )
        if hidden and not declared:
            raise ConfigError(f"{key}: the owner of this node declares no declared-examples, which it takes")
        privacy = replace(privacy, declared_examples=declared)
    if settings.dataset_id:
        privacy = replace(privacy, dataset_id=settings.dataset_id)
    return config if privacy is config.privacy else replace(config, privacy=privacy)


def _labels(instruction: wire.TrainInstruction) -> tuple[str, ...]:
    return tuple(instruction.config.get("labels", ()))


def _node(settings: NodeSettings, *, simulation: bool) -> Node:
    return Node(
        partition_id=settings.partition_id,
        state_dir=settings.home,
        simulation=simulation,
        max_epsilon=settings.max_epsilon or float("inf"),
        max_delta=settings.max_delta if settings.max_epsilon else 1.0,
    )
