"""A Flower mod that lets anybody's PEFT ClientApp work with strategies that move the base.

    app = ClientApp(mods=[base_mod(move_base, Path("state"))])

The mod stores base patches and frozen factors, asks for those that are missing, hands the app a complete
PEFT state dict under ``arrays``, and acknowledges in the reply what the client holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from clients.holdings import Holdings
from clients.orders import open_order
from fedlora import wire
from fedlora.updates import Patch


def base_mod(move_base: Callable[[Sequence[Patch]], None], state_dir: Path) -> Mod:
    """The mod; use it for the ``train`` and ``evaluate`` functions of a ClientApp.

    Args:
        move_base: called before each message with all patches P_1 .. P_v in order; it must leave the
            base weights at ``W_0 + P_1 + .. + P_v``. `fedlora.models.moving.MovingBase.move` does that
            and skips what is applied already.
        state_dir: where parts are kept between messages.
    """

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if (
            wire.CONFIG not in message.content
            or "needs-frozen" not in message.content.config_records[wire.CONFIG]
        ):
            return call_next(message, context)
        order = wire.decode_order(message.content)
        opened = open_order(order, Holdings(state_dir / str(order.config.get("run-key", context.run_id))))
        if isinstance(opened, wire.Reply):
            return Message(wire.encode_reply(opened), reply_to=message)
        move_base([opened.patch(name) for name in order.needs.base])
        message.content[wire.ARRAYS] = wire.to_record(wire.to_peft(opened.adapters, opened.head))
        reply = call_next(message, context)
        if reply.has_content():
            reply.content[wire.CONFIG] = ConfigRecord(
                {"status": wire.OK, "answers": order.identity, **_holds(order)}
            )
        return reply

    return mod


def _holds(order: wire.TrainOrder) -> dict[str, list[str]]:
    return {"holds": list(order.needs.digests)} if order.needs.digests else {}
