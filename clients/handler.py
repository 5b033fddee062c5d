"""Handles messages at a node: within what its owner allows, on its own data if it has any."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import RecordDict

from clients import secure, secure_steps
from clients.execute import train_instruction
from clients.execute_evaluation import evaluate_instruction
from clients.journal import write_down
from clients.node import Node
from clients.node_settings import NodeSettings, node_settings, own_of
from clients.owner import (
    LARGEST_VALUE,
    REFUSAL,
    evaluations_of,
    explained_refusal,
    in_owners_name,
    is_protected,
    one_refusal,
    refuse_beyond_allowed,
    refuse_beyond_limit,
)
from clients.runtime import ClientRuntime, RuntimeCache, configured
from clients.store import run_key
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.files import write_atomic
from fedlora.core.parallel import one_thread
from fedlora.errors import ConfigError, FedLoraError, named_line, shown_apart
from fedlora.secure.step import STEP

TRAIN, EVALUATE = "train", "evaluate"
BASE_SEEN = "base-model.txt"
"""In a run's store: the hash of the base, once it was found to be the server's."""


def handle(
    kind: str,
    content: RecordDict,
    run_config: Mapping[str, Any],
    node_config: Mapping[str, Any],
    runtimes: RuntimeCache,
    state: RecordDict | None = None,
) -> RecordDict:
    """The reply to a message.

    Args:
        kind: ``train``, ``evaluate`` or a step of secure sums.
        content: of the message.
        run_config: Flower's, of the run.
        node_config: Flower's, of the node.
        runtimes: of this process.
        state: the node's between messages, changed in place; None where somebody else keeps it, who also puts
            an update under its masks.

    Raises:
        UpdateRefused: the message is not an instruction.
        FedLoraError: in simulation, whatever is wrong.
    """
    simulation = bool(node_config.get("simulation", False))
    config, settings = configured(run_config), node_settings(node_config)
    if kind == STEP:
        kept = RecordDict() if state is None else state
        return secure_steps.carry_out(content, config, settings, kept, simulation=simulation)
    instruction = wire.decode_instruction(content)
    protected = not simulation and is_protected(config, settings)

    def answer() -> wire.Reply:
        if kind == TRAIN:
            refuse_beyond_limit(config, settings)
        if not simulation:
            refuse_beyond_allowed(config, settings)
        with one_thread():
            own = in_owners_name(config, settings, simulation=simulation)
            runtime = runtimes.get(own, own_of(settings, _labels(instruction)))
            if not simulation:
                refuse_other_inputs(runtime, instruction, own, settings)
            node = _node(settings, simulation=simulation, protected=protected)
            if kind == TRAIN:
                node = replace(node, check_start=secure.start_check(content, config, settings))
            execute = evaluate_instruction if kind == EVALUATE else train_instruction
            return execute(runtime, instruction, own, node)

    if protected:
        reply = one_refusal(answer)
    elif simulation:
        reply = answer()
    else:
        reply = explained_refusal(answer)
    if kind == TRAIN:
        reply, encoded = secure.encoded(
            reply, instruction, content, config, settings, state, protected=protected, simulation=simulation
        )
    else:
        encoded = wire.encode_reply(reply, instruction, packed=instruction.packed)
    if simulation:
        return encoded
    try:
        write_down(settings, config, instruction, kind, reply, encoded)
    except OSError as error:
        logging.getLogger("fedlora").warning("declined, for the journal cannot be written: %s", error)
        unsaid = wire.Reply(status=wire.DECLINED, reason=REFUSAL)
        return wire.encode_reply(unsaid, instruction, packed=instruction.packed)
    return encoded


def handle_together(
    contents: Sequence[RecordDict],
    run_configs: Sequence[Mapping[str, Any]],
    node_configs: Sequence[Mapping[str, Any]],
    runtimes: RuntimeCache,
    states: Sequence[RecordDict] | None = None,
) -> list[RecordDict | str]:
    """The replies to messages to train for several simulated nodes in this process, in their order.

    A node that fails has the first line of its error instead; the others do not notice.
    """
    from clients.execute_cohort import Assignment, train_instructions

    states = [RecordDict() for _ in contents] if states is None else states

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
            node = _node(settings, simulation=simulation, protected=False)
            check = secure.start_check(content, configured(run_config), settings)
            assignments[place] = Assignment(runtime, instruction, config, replace(node, check_start=check))
        except Exception as error:
            answers[place] = _line(error)
    with one_thread():
        replies = train_instructions(list(assignments.values()))
    for (place, assigned), reply in zip(assignments.items(), replies, strict=True):
        if isinstance(reply, wire.Reply):
            config, settings = configured(run_configs[place]), node_settings(node_configs[place])
            _, answers[place] = secure.encoded(
                reply, assigned.instruction, contents[place], config, settings, states[place],
                simulation=assigned.node.simulation,
            )  # fmt: skip
        else:
            answers[place] = _line(reply)
    return [answers[place] for place in range(len(contents))]


def refuse_other_inputs(
    runtime: ClientRuntime, instruction: wire.TrainInstruction, config: RunConfig, settings: NodeSettings
) -> None:
    """Hold a node's base model and labels to the server's, before anything is trained on them.

    The weights are hashed once for a run. Packed ones are not compared: how they are packed is the device's.

    Raises:
        ConfigError: other weights, or other names or another order of labels.
    """
    theirs, labels = str(instruction.config.get("base-digest", "")), _labels(instruction)
    here = tuple(runtime.data.label_names)
    if labels and not settings.data and here != labels:
        ours, of_run = shown_apart(here, labels)
        raise ConfigError(
            f"data.name = {config.data.name!r}: its labels are {ours} on this node, the run's are {of_run}"
        )
    seen = settings.home / run_key(instruction) / BASE_SEEN
    if not theirs or (seen.exists() and seen.read_bytes() == theirs.encode()):
        return
    own = runtime.model.base_digest()
    if own != theirs:
        raise ConfigError(
            f"model.name = {config.model.name!r}: its weights on this node are not the server's (hash "
            f"{own[:12]}, the server's {theirs[:12]}); put the same files on both"
        )
    write_atomic(seen, theirs)


def _line(error: Exception) -> str:
    if not isinstance(error, FedLoraError):
        logging.getLogger("fedlora").error("client failed", exc_info=error)
    return named_line(error)


def _labels(instruction: wire.TrainInstruction) -> tuple[str, ...]:
    return tuple(instruction.config.get("labels", ()))


def _node(settings: NodeSettings, *, simulation: bool, protected: bool) -> Node:
    return Node(
        partition_id=settings.partition_id,
        state_dir=settings.home,
        simulation=simulation,
        max_epsilon=settings.max_epsilon or math.inf,
        max_delta=settings.max_delta if settings.max_epsilon else 1.0,
        set_aside=settings.set_aside,
        largest_value=LARGEST_VALUE if protected else math.inf,
        **(evaluations_of(settings) if protected else {}),
    )
