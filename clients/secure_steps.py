"""Steps of secure sums at a client: keys, shares, masks on its update, what it goes by, and unmasking.

Between two messages a client is a record in Flower's state of the node, in the memory of the process that
carries its messages (an engine, the SuperNode), and never on disk. The last step leaves nothing of it.
Importing this imports no model and no tensors, as in deployment there is a new process for every message.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from clients.journal import write_step
from clients.node_settings import NodeSettings
from fedlora.config import RunConfig, from_flat, to_flat
from fedlora.errors import ConfigError, SecureRefused
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.masks import packed, unpacked
from fedlora.secure.participant import Participant, Terms, common_start
from fedlora.secure.peers import PUBLIC, SURVIVORS, Identity, read_identity, to_sign
from fedlora.secure.step import (
    ADVERTISE,
    CONFIRM,
    MASKED,
    SECURE,
    SHARE,
    START,
    STARTS,
    UNMASK,
    Step,
    step_of,
)

SUMS = "sums"


def terms_of(config: RunConfig, settings: NodeSettings | None = None) -> Terms:
    """The terms of a run; a node's owner may set a higher least number of clients.

    Raises:
        SecureRefused: fewer holders would do than the owner says.
    """
    secure, least, share = config.secure, 0, 0.0
    if settings is not None:
        least, share = settings.secure_clients, settings.secure_threshold
    if secure.threshold < share:
        raise SecureRefused(
            f"secure.threshold = {secure.threshold:g}: this node's owner has secure-threshold = {share:g}"
        )
    return Terms(min_clients=max(secure.min_clients, least), share=secure.threshold, bits=secure.bits)


def acting(config: RunConfig, partition: int) -> str:
    """The configuration as a text, and what a client's own group has in place of it."""
    group = config.group_of(partition)
    own = {} if group is None else asdict(group) | {"partitions": "", "device": ""}
    return _text(config) + json.dumps(own)


@lru_cache(maxsize=8)
def _text(config: RunConfig) -> str:
    """The same at server and client, however the values came to be."""
    return json.dumps(to_flat(from_flat(to_flat(config))), sort_keys=True)


def carry_out(
    content: RecordDict, config: RunConfig, settings: NodeSettings, state: RecordDict, *, simulation: bool
) -> RecordDict:
    """The answer to a step; a refusal in one line; a node writes down what it says first."""
    asked = content.config_records.get(SECURE, ConfigRecord())
    try:
        answer = _step(step_of(content.config_records), config, settings, state)
    except SecureRefused as error:
        logging.getLogger("fedlora").warning("secure sums: %s", error)
        answer = {"reason": str(error)}
    if not simulation:
        try:
            write_step(settings, config, asked, answer)
        except OSError as error:
            from clients.owner import REFUSAL  # imports tensors

            logging.getLogger("fedlora").warning("declined, for the journal cannot be written: %s", error)
            answer = {"reason": REFUSAL}
    return RecordDict({SECURE: ConfigRecord(answer)})


def fixed_point(asked: Step, config: RunConfig, settings: NodeSettings) -> FixedPoint:
    """How the numbers of a round are written.

    Raises:
        SecureRefused: sums of so many clients and weights would overflow.
    """
    clients, most = len(asked.numbers("sharers")), asked.number("max-weight")
    try:
        return FixedPoint(clients, terms_of(config, settings).bits, config.secure.largest_change, most)
    except ConfigError as error:
        raise SecureRefused(str(error)) from None


def under_masks(
    reply: RecordDict, content: RecordDict, config: RunConfig, settings: NodeSettings, state: RecordDict
) -> None:
    """Mask the row in a reply, in place; without a reply that can be masked nothing leaves.

    Args:
        reply: with the row in the clear.
        content: of the message that it answers, with what the client's neighbours sealed for it.
        config: the run.
        settings: of the node.
        state: the node's, between messages.

    Raises:
        SecureRefused: no round of this client's, or as `Participant.mask`.
    """
    body = reply.array_records.pop(MASKED)[MASKED].numpy()
    asked, terms = step_of(content.config_records), terms_of(config, settings)
    row = unpacked(body, terms.bits)
    member, sharers = member_of(state, asked), asked.numbers("sharers")
    starts = _starts(asked, config, settings.partition_id)
    alike = [p for p, start in starts.items() if start == asked.binary(START)]
    counted = alike if settings.secure_peers and STARTS in asked.record else ()
    after, masked = member.mask(
        sharers, asked.table("from", "sealed"), row, terms, common_start(starts), counted
    )
    keep(state, after)
    reply[MASKED] = ArrayRecord({MASKED: Array(packed(masked, terms.bits))})


def _starts(asked: Step, config: RunConfig, partition: int) -> dict[int, bytes]:
    """What each of the round's clients starts from, by its digest; this one's is held to what it was sent.

    Raises:
        SecureRefused: unlike ones in a run in which all clients are asked the same, or not this one's own.
    """
    own = asked.binary(START)
    if STARTS not in asked.record:
        return dict.fromkeys(asked.numbers("sharers"), own)
    starts = asked.table("sharers", STARTS)
    if not config.mixed:
        raise SecureRefused("clients start unlike, in a run in which all are asked the same")
    if starts.get(partition) != own:
        raise SecureRefused("what the others are told of this client's start is not what it was sent")
    return starts


def member_of(state: RecordDict, asked: Step) -> Participant:
    """Who this client is in the round that a step belongs to.

    Raises:
        SecureRefused: nobody.
    """
    kept = state.config_records.get(SECURE)
    member = None if kept is None else Participant.of(kept)
    if member is None or member.session != asked.text("session"):
        raise SecureRefused("this client has no keys for that round, or no longer")
    return member


def keep(state: RecordDict, member: Participant) -> None:
    """Leave a client in the node's state until the next message."""
    state[SECURE] = ConfigRecord(member.kept())


def _step(asked: Step, config: RunConfig, settings: NodeSettings, state: RecordDict) -> dict[str, Any]:
    if config.secure.mode != SUMS:
        raise SecureRefused("secure.mode = 'none': this run has no secure sums")
    terms, phase, own = terms_of(config, settings), asked.text("phase"), settings.partition_id
    identity = _identity(settings)
    if phase == ADVERTISE:
        member = Participant.advertise(asked.text("session"), own)
        keep(state, member)
        return {"keys": member.public, **_signed(identity, PUBLIC, member, own, member.public)}
    member = member_of(state, asked)
    if phase == SHARE:
        keys = asked.table("partitions", "keys")
        if identity is not None:
            _check_keys(identity, member, keys, asked.table("partitions", "signatures"))
        member, sealed, digest = member.share(keys, terms)
        keep(state, member)
        return {"holders": list(sealed), "sealed": list(sealed.values()), "digest": digest}
    if phase == CONFIRM:
        member = member.confirm(asked.numbers("survivors"), terms)
        keep(state, member)
        return _signed(identity, SURVIVORS, member, *member.agreed(terms))
    if phase == UNMASK:
        if identity is None:
            member = member.confirm(asked.numbers("survivors"), terms)
        else:
            _check_agreement(identity, member, asked.table("signers", "signatures"), terms)
        own_shares, pair_shares = member.unmask()
        del state[SECURE]  # a second unmasking finds nothing
        told = {
            "own-of": list(own_shares),
            "own": list(own_shares.values()),
            "pair-of": list(pair_shares),
            "pair": list(pair_shares.values()),
        }
        return {key: values for key, values in told.items() if values}
    raise SecureRefused(f"phase = {phase!r}: accepted are {ADVERTISE}, {SHARE}, {CONFIRM}, {UNMASK}")


# --- what nodes sign ------------------------------------------------------------------------------------


def _identity(settings: NodeSettings) -> Identity | None:
    """Who this node is among those that its owner knows; None where the server's word is taken for all."""
    if not settings.secure_peers:
        return None
    try:
        return read_identity(Path(settings.secure_peers), settings.partition_id)
    except ConfigError as error:
        from clients.owner import REFUSAL  # imports tensors

        logging.getLogger("fedlora").warning("secure sums: %s", error)
        raise SecureRefused(REFUSAL) from None


def _signed(identity: Identity | None, what: str, member: Participant, *parts: bytes | int) -> dict[str, Any]:
    if identity is None:
        return {}
    return {"signature": identity.sign(to_sign(what, member.session, *parts))}


def _check_keys(
    identity: Identity, member: Participant, keys: Mapping[int, bytes], signatures: Mapping[int, bytes]
) -> None:
    """Whether all keys are those of nodes that the owner knows, made for this round."""
    for partition, key in keys.items():
        signed = to_sign(PUBLIC, member.session, partition, key)
        identity.peers.check(partition, signatures.get(partition, b""), signed)


def _check_agreement(
    identity: Identity, member: Participant, signatures: Mapping[int, bytes], terms: Terms
) -> None:
    """Whether as many of the round's clients as hold a secret go by the very list that this one goes by."""
    signed = to_sign(SURVIVORS, member.session, *member.agreed(terms))
    for partition, signature in signatures.items():
        identity.peers.check(partition, signature, signed)
    agree, least = len(signatures.keys() & set(member.survivors)), terms.least_of(len(member.partitions))
    if agree < least:
        raise SecureRefused(f"{agree} clients signed who is in the sum, the least is {least}")
