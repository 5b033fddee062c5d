"""Secure sums at a client: its update under masks; see `fedlora.secure` and `clients.secure_steps`."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from flwr.app import RecordDict

from clients.node_settings import NodeSettings
from clients.owner import REFUSAL
from clients.privacy import mechanism_of
from clients.secure_steps import SUMS, keep, member_of, terms_of
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.seeding import stream
from fedlora.errors import ConfigError, SecureRefused
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.step import step_of


def encoded(
    reply: wire.Reply, instruction: wire.TrainInstruction, content: RecordDict, config: RunConfig,
    settings: NodeSettings, state: RecordDict, *, protected: bool = False,
) -> tuple[wire.Reply, RecordDict]:  # fmt: skip
    """The reply to an instruction to train as it leaves, under masks where the run has secure sums.

    Args:
        reply: with the update in the clear.
        instruction: that it answers.
        content: its message, with what the client's neighbours sealed for it.
        config: the run.
        settings: of the node.
        state: the node's, between messages.
        protected: why it declines may depend on its data, and is told to its owner alone.
    """
    if config.secure.mode != SUMS or reply.status != wire.OK:
        return reply, wire.encode_reply(reply, instruction, packed=instruction.packed)
    try:
        row = _masked(reply, instruction, content, config, settings, state)
    except SecureRefused as error:
        logging.getLogger("fedlora").warning("secure sums: %s", error)
        told = REFUSAL if protected else str(error)
        declined = wire.Reply(status=wire.DECLINED, reason=told, own_reason=str(error))
        return declined, wire.encode_reply(declined, instruction, packed=instruction.packed)
    bare = replace(reply, arrays={}, start={}, metrics={})
    records = wire.encode_reply(bare, instruction, packed=instruction.packed)
    records[wire.MASKED] = wire.masked_record(row)
    return bare, records


def _masked(
    reply: wire.Reply, instruction: wire.TrainInstruction, content: RecordDict, config: RunConfig,
    settings: NodeSettings, state: RecordDict,
) -> Any:  # fmt: skip
    asked, terms = step_of(content.config_records), terms_of(config, settings)
    member, sharers = member_of(state, asked), asked.numbers("sharers")
    if not member.session.startswith(f"{instruction.identity}, "):
        raise SecureRefused("the keys were made for another run, or another round of it")
    try:
        fixed = FixedPoint(len(sharers), terms.bits, config.secure.largest_change, asked.number("max-weight"))
    except ConfigError as error:
        raise SecureRefused(str(error)) from None
    key = mechanism_of(config).weighted_by_key
    weight = 1.0 if key is None else reply.metrics.get(key, -1.0)
    if not (weight.is_integer() and 0 <= weight <= fixed.max_weight):  # how many it has is not told
        raise SecureRefused(f"its {key} is not whole, or beyond secure.max-weight = {fixed.max_weight}")
    rounding = stream(config.seed, "secure", instruction.server_round, settings.partition_id)
    loss = reply.metrics.get("train-loss")
    row = wire.to_row(reply.start, reply.arrays, int(weight), loss, fixed, rounding)
    after, masked = member.mask(sharers, asked.table("from", "sealed"), row, terms)
    keep(state, after)
    return masked
