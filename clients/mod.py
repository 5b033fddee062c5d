"""A Flower mod that lets anybody's PEFT ClientApp work with every strategy, those that move the base too.

    app = ClientApp(mods=[base_mod(lambda context: own_model(), "~/state")])

The mod stores base patches and frozen factors, asks for those that are missing, moves the base of the app's
own model, refuses an instruction whose ranks or scaling are not the model's, hands the app a complete PEFT
state dict under ``arrays``, and acknowledges in the reply what the client holds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from peft import PeftModel

from clients.store import ClientStore, resolve
from fedlora import wire
from fedlora.core.adapters import lora_set
from fedlora.errors import FedLoraError, first_line
from fedlora.models.peft_model import check_fits, moving_base


def base_mod(model: Callable[[Context], PeftModel], state_dir: Path | str) -> Mod:
    """The mod; use it for the ``train`` and ``evaluate`` functions of a ClientApp.

    Args:
        model: gives the PEFT model that the app trains and evaluates, the same object for every message
            (``functools.cache``): its base weights are brought to ``W_0 + P_1 + .. + P_v`` in place.
        state_dir: where parts are kept between messages; ``~`` is the home directory.
    """
    root = Path(state_dir).expanduser()

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if wire.instruction_settings(message.content) is None:
            return call_next(message, context)
        try:
            instruction = wire.decode_instruction(message.content)
            refusal = _prepared(instruction, message, context)
        except FedLoraError as error:
            refusal = wire.Reply(status=wire.DECLINED, reason=first_line(error))
        if refusal is not None:
            return Message(wire.encode_reply(refusal), reply_to=message)
        reply = call_next(message, context)
        if reply.has_content():
            said = reply.content.config_records.get(wire.CONFIG, ConfigRecord())
            coded = {key: value for key, value in said.items() if key == "upload"}
            reply.content[wire.CONFIG] = ConfigRecord(
                {"status": wire.OK, "answers": instruction.identity, **_holds(instruction), **coded}
            )
        return reply

    def _prepared(
        instruction: wire.TrainInstruction, message: Message, context: Context
    ) -> wire.Reply | None:
        """Bring base and arrays to what the instruction says; or the reply that says what is lacking."""
        resolved = resolve(
            instruction, ClientStore(root / str(instruction.config.get("run-key", context.run_id)))
        )
        if isinstance(resolved, wire.Reply):
            return resolved
        own = model(context)
        if model(context) is not own:
            reason = "base_mod: the model must be the same object for every message, use functools.cache"
            return wire.Reply(status=wire.DECLINED, reason=reason)
        check_fits(own, lora_set(resolved.adapters))
        if instruction.config.get("moves-base"):
            moving_base(own).check_whole()
        moving_base(own).move_to([resolved.patch(name) for name in instruction.needs.base])
        message.content[instruction.named] = wire.to_record(wire.to_peft(resolved.adapters, resolved.head))
        return None

    return mod


def identify(message: Message, context: Context) -> Message:
    """Answer which partition this node holds; ``app.query()(identify)`` makes runs reproducible.

    Clients draw their first A by partition, and ``client_spec`` gives ranks by partition. Nodes that do not
    say theirs are numbered by their random node ids.
    """
    partition = int(context.node_config["partition-id"])
    answer = ConfigRecord({"partition-id": partition})
    return Message(RecordDict({wire.CONFIG: answer}), reply_to=message)


def _holds(instruction: wire.TrainInstruction) -> dict[str, list[str]]:
    return {"holds": list(instruction.needs.digests)} if instruction.needs.digests else {}
