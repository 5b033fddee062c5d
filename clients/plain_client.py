"""Additions to an app with a plain PEFT client: to freeze factors, to keep them, to send fewer bytes.

    train_as_ordered(model, message)                            (in the train function, before training)
    app = ClientApp(mods=[own_mod("~/state")])
    app = ClientApp(mods=[upload_mod])

Which rules need which is in the table of ``docs/flower.md``; those that move the base need `clients.mod`.
"""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import nn

from clients.store import OWED, OWN, ClientStore
from fedlora import wire
from fedlora.core.factors import PLAIN, Tensors


def train_as_ordered(model: nn.Module, message: Message) -> None:
    """Let exactly those LoRA factors of a PEFT model require gradients that the message orders to train.

    Other parameters stay as they are, and so does the model where the message is no instruction of a fedlora
    strategy. A trained factor of the round before may rest in this one: call it for every message.
    """
    settings = wire.instruction_settings(message.content)
    if settings is None:
        return
    trained, modules = wire.names(str(settings["trained"])), set(json.loads(str(settings["modules"])))
    for name, parameter in model.named_parameters():
        for factor in sorted(PLAIN):
            module, found, _ = name.removeprefix(wire.PREFIX).partition(f".lora_{factor}.")
            if found:
                parameter.requires_grad_(factor in trained and module in modules)


def own_mod(state_dir: Path | str) -> Mod:
    """The mod for FedSA-LoRA: factors that are trained and not sent stay in ``state_dir``, by partition.

    The app finds its own ones among the arrays of each message. A node that does not say its
    ``partition-id`` is known by its node id; one that lost its files begins again from the start.
    """
    root = Path(state_dir).expanduser()

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        settings = wire.instruction_settings(message.content)
        if settings is None:
            return call_next(message, context)
        instruction = wire.decode_instruction(message.content)
        endings = tuple(f".lora_{factor}.weight" for factor in instruction.trained - instruction.uploaded)
        who = int(context.node_config.get("partition-id", context.node_id))
        store = ClientStore(root / str(instruction.config.get("run-key", context.run_id)))
        trained = not message.metadata.message_type.startswith(MessageType.EVALUATE)
        held = store.personal(who, OWN, instruction.server_round + (0 if trained else 1)) or {}
        message.content[instruction.named] = wire.to_record({**instruction.arrays, **held})
        reply = call_next(message, context)
        arrays = wire.array_record(reply.content) if trained and endings and reply.has_content() else None
        if arrays is not None:
            own = {name: arrays.pop(name) for name in list(arrays) if name.endswith(endings)}
            store.keep_personal(who, OWN, instruction.server_round, wire.from_record(ArrayRecord(own)))
        return reply

    return mod


def upload_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A mod that writes the reply's arrays as the strategy's ``upload`` says; without it they stay floats.

    What a codec with error feedback leaves out stays in the app's context, and is lost with it. The last of
    the mods (``mods=[base_mod(...), upload_mod]``), so that it sees what training begins from.
    """
    if wire.instruction_settings(message.content) is None:
        return call_next(message, context)
    instruction = wire.decode_instruction(message.content)
    reply = call_next(message, context)
    arrays = wire.array_record(reply.content) if reply.has_content() else None
    if instruction.codec.name == "float32" or arrays is None:
        return reply
    start, trained = instruction.arrays, wire.from_record(arrays)
    if instruction.codec.feedback:
        trained = _settled(instruction, context, start, trained)
    name = next(name for name, record in reply.content.array_records.items() if record is arrays)
    reply.content[name] = wire.to_record(instruction.coded(start, trained), None)
    said = reply.content.config_records.get(wire.CONFIG, ConfigRecord())
    reply.content[wire.CONFIG] = ConfigRecord({**said, "upload": instruction.codec.name})
    return reply


def _settled(
    instruction: wire.TrainInstruction, context: Context, start: Tensors, trained: Tensors
) -> Tensors:
    """What was trained and what was owed; the context keeps what of it is owed after this round.

    By run and round, so that a round that is carried out again finds what it found before.
    """
    begins = f"{OWED}-{instruction.config.get('run-key', context.run_id)}-"
    kept = sorted(name for name in context.state.array_records if name.startswith(begins))
    before = [name for name in kept if int(name.removeprefix(begins)) < instruction.server_round]
    owed = wire.from_record(context.state.array_records[before[-1]]) if before else {}
    trained = wire.with_owed(trained, owed)
    owed |= instruction.left_out(start, trained)
    for name in kept:
        if name not in before[-1:]:
            del context.state[name]
    context.state[f"{begins}{instruction.server_round:06d}"] = wire.to_record(owed)
    return trained
