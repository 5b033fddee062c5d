"""Secure sums at a client: its update as the row of integers that goes under masks; see `fedlora.secure`.

The masks are put on by `clients.secure_steps.under_masks`, in whichever process the client's secrets are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from flwr.app import RecordDict

from clients.node_settings import NodeSettings
from clients.owner import REFUSAL
from clients.privacy import mechanism_of
from clients.secure_steps import SUMS, acting, fixed_point, under_masks
from clients.store import ResolvedInstruction
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.adapters import lora_set, tensor_names
from fedlora.core.base_patches import digest
from fedlora.core.factors import Tensors
from fedlora.core.seeding import stream
from fedlora.core.sketch import Sketch
from fedlora.errors import ConfigError, SecureRefused
from fedlora.secure.masks import Unsigned
from fedlora.secure.noise import SharedNoise, Words, seeded_words, system_words
from fedlora.secure.step import SKETCH, START, Step, step_of


def start_check(
    content: RecordDict, config: RunConfig, settings: NodeSettings
) -> Callable[[wire.TrainInstruction, ResolvedInstruction], None] | None:
    """What holds a client's start to the digest in its order, on which the masks of all depend.

    None where a run has no secure sums.
    """
    if config.secure.mode != SUMS:
        return None

    def check(instruction: wire.TrainInstruction, resolved: ResolvedInstruction) -> None:
        asked = step_of(content.config_records)
        values = digest(wire.to_peft(resolved.adapters, resolved.head))
        found = wire.start_digest(values, instruction.config, acting(config, settings.partition_id), asked)
        if found != (told := asked.binary(START)):
            raise ConfigError(
                f"round {instruction.server_round}: secure sums: what this client would start from (values, "
                f"settings and configuration, {found.hex()[:12]}) is not what the round's clients agree on "
                f"({told.hex()[:12]})"
            )

    return check


def encoded(
    reply: wire.Reply, instruction: wire.TrainInstruction, content: RecordDict, config: RunConfig,
    settings: NodeSettings, state: RecordDict | None, *, simulation: bool,
    protected: bool = False,
) -> tuple[wire.Reply, RecordDict]:  # fmt: skip
    """The reply to an instruction to train as it leaves, under masks where the run has secure sums.

    Args:
        reply: with the update in the clear.
        instruction: that it answers.
        content: its message, with what the client's neighbours sealed for it.
        config: the run.
        settings: of the node.
        state: the node's, between messages; None: the row is not masked yet, whoever has the state does it.
        simulation: noise is drawn from the run's seed, not from the operating system.
        protected: why it declines may depend on its data, and is told to its owner alone.
    """
    if config.secure.mode != SUMS or reply.status != wire.OK:
        return reply, wire.encode_reply(reply, instruction, packed=instruction.packed)
    bare = replace(reply, arrays={}, start={}, adapters={}, metrics={})
    records = wire.encode_reply(bare, instruction, packed=instruction.packed)
    try:
        row = _row(reply, instruction, content, config, settings, simulation=simulation)
        records[wire.MASKED] = wire.masked_record(row, config.secure.bits)
        if state is not None:
            under_masks(records, content, config, settings, state)
    except SecureRefused as error:
        logging.getLogger("fedlora").warning("secure sums: %s", error)
        told = REFUSAL if protected else str(error)
        declined = wire.Reply(status=wire.DECLINED, reason=told, own_reason=str(error))
        return declined, wire.encode_reply(declined, instruction, packed=instruction.packed)
    return bare, records


def _row(
    reply: wire.Reply, instruction: wire.TrainInstruction, content: RecordDict, config: RunConfig,
    settings: NodeSettings, *, simulation: bool,
) -> Unsigned:  # fmt: skip
    asked = step_of(content.config_records)
    if not asked.text("session").startswith(f"{instruction.identity}, "):
        raise SecureRefused("the keys were made for another run, or another round of it")
    privacy = mechanism_of(config)
    if privacy.shared_noise is not None:
        words = words_of(config, instruction.server_round, settings.partition_id, simulation=simulation)
        return wire.to_noisy_row(reply.start, reply.arrays, _noise(privacy.shared_noise, asked), words)
    fixed, key = fixed_point(asked, config, settings), privacy.weighted_by_key
    weight = 1.0 if key is None else reply.metrics.get(key, -1.0)
    if not (weight.is_integer() and 0 <= weight <= fixed.max_weight):  # how many it has is not told
        raise SecureRefused(f"its {key} is not whole, or beyond secure.max-weight = {fixed.max_weight}")
    rounding = stream(config.seed, "secure", instruction.server_round, settings.partition_id)
    loss = reply.metrics.get("train-loss")
    start, trained = (reply.start, reply.arrays) if SKETCH not in asked.record else _sketched(reply, asked)
    return wire.to_row(start, trained, int(weight), loss, fixed, rounding)


def _sketched(reply: wire.Reply, asked: Step) -> tuple[Tensors, Tensors]:
    """Zeros and sketches in place of the factors that were shipped, and the head."""
    sketch, layers = Sketch(asked.number(SKETCH), asked.number("sketch-seed")), asked.texts("layers")
    if not reply.adapters.keys() >= set(layers):
        raise SecureRefused("sketches are asked of layers that it has not")
    factors = lora_set({name: reply.adapters[name] for name in layers})
    names = tensor_names(reply.adapters)
    start, trained = (wire.from_peft(tensors, names).head for tensors in (reply.start, reply.arrays))
    return start | sketch.start(factors), trained | sketch.sketches(factors)


def _noise(shared: Callable[[int], SharedNoise], asked: Step) -> SharedNoise:
    try:
        return shared(len(asked.numbers("sharers")))
    except ConfigError as error:
        raise SecureRefused(str(error)) from None


def words_of(config: RunConfig, server_round: int, partition_id: int, *, simulation: bool) -> Words:
    """What a client's noise is drawn from: the operating system, in simulation the run's seed."""
    if not simulation:
        return system_words
    return seeded_words(stream(config.seed, "secure-noise", server_round, partition_id))
