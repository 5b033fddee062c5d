"""Secure sums at a client: its steps of a round, and its update under masks; see `fedlora.secure`.

Between two messages a client is a record in Flower's state of the node, in the memory of the process that
carries its messages (an engine, the SuperNode), and never on disk. The last step leaves nothing of it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from clients.node_settings import NodeSettings
from clients.privacy import mechanism_of
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.seeding import stream
from fedlora.errors import ConfigError, SecureRefused
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.participant import Participant, Terms

SUMS = "sums"


def terms_of(config: RunConfig, least: int = 0) -> Terms:
    """The terms of a run; a node's owner may set a higher least number of clients."""
    secure = config.secure
    return Terms(min_clients=max(secure.min_clients, least), share=secure.threshold, bits=secure.bits)


def carry_out(
    content: RecordDict, config: RunConfig, settings: NodeSettings, state: RecordDict
) -> RecordDict:
    """The answer to a step; what a client refuses it says in one line."""
    try:
        answer = _step(wire.step_of(content), config, settings, state)
    except SecureRefused as error:
        logging.getLogger("fedlora").warning("secure sums: %s", error)
        answer = {"reason": str(error)}
    return RecordDict({wire.SECURE: ConfigRecord(answer)})


def _step(asked: wire.Step, config: RunConfig, settings: NodeSettings, state: RecordDict) -> dict[str, Any]:
    if config.secure.mode != SUMS:
        raise SecureRefused("secure.mode = 'none': this run has no secure sums")
    terms, phase = terms_of(config, settings.secure_clients), asked.text("phase")
    if phase == wire.ADVERTISE:
        member = Participant.advertise(asked.text("session"), settings.partition_id)
        _keep(state, member)
        return {"keys": member.public}
    member = _member(state, asked)
    if phase == wire.SHARE:
        member, sealed, digest = member.share(asked.table("partitions", "keys"), terms)
        _keep(state, member)
        return {"holders": list(sealed), "sealed": list(sealed.values()), "digest": digest}
    if phase == wire.UNMASK:
        own, pair = member.unmask(asked.numbers("survivors"), terms)
        del state[wire.SECURE]  # a second unmasking finds nothing
        told = {
            "own-of": list(own),
            "own": list(own.values()),
            "pair-of": list(pair),
            "pair": list(pair.values()),
        }
        return {key: values for key, values in told.items() if values}
    raise SecureRefused(f"phase = {phase!r}: accepted are {wire.ADVERTISE}, {wire.SHARE}, {wire.UNMASK}")


def encoded(
    reply: wire.Reply, instruction: wire.TrainInstruction, content: RecordDict, config: RunConfig,
    settings: NodeSettings, state: RecordDict,
) -> tuple[wire.Reply, RecordDict]:  # fmt: skip
    """The reply to an instruction to train as it leaves, under masks where the run has secure sums.

    Args:
        reply: with the update in the clear.
        instruction: that it answers.
        content: its message, with what the client's neighbours sealed for it.
        config: the run.
        settings: of the node.
        state: the node's, between messages.
    """
    if config.secure.mode != SUMS or reply.status != wire.OK:
        return reply, wire.encode_reply(reply, instruction, packed=instruction.packed)
    try:
        row = _masked(reply, instruction, content, config, settings, state)
    except SecureRefused as error:
        logging.getLogger("fedlora").warning("secure sums: %s", error)
        declined = wire.Reply(status=wire.DECLINED, reason=str(error), own_reason=str(error))
        return declined, wire.encode_reply(declined, instruction, packed=instruction.packed)
    bare = replace(reply, arrays={}, start={}, metrics={})
    records = wire.encode_reply(bare, instruction, packed=instruction.packed)
    records[wire.MASKED] = wire.masked_record(row)
    return bare, records


def _masked(
    reply: wire.Reply, instruction: wire.TrainInstruction, content: RecordDict, config: RunConfig,
    settings: NodeSettings, state: RecordDict,
) -> Any:  # fmt: skip
    asked, terms = wire.step_of(content), terms_of(config, settings.secure_clients)
    member, sharers = _member(state, asked), asked.numbers("sharers")
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
    _keep(state, after)
    return masked


def _member(state: RecordDict, asked: wire.Step) -> Participant:
    """Who this client is in the round that a step belongs to."""
    kept = state.config_records.get(wire.SECURE)
    member = None if kept is None else Participant.of(kept)
    if member is None or member.session != asked.text("session"):
        raise SecureRefused("this client has no keys for that round, or no longer")
    return member


def _keep(state: RecordDict, member: Participant) -> None:
    state[wire.SECURE] = ConfigRecord(member.kept())
