"""Journal of a node, for its owner: what left the machine, and which messages were declined and why.

A line of ``<state>/sent.jsonl`` for each reply, on disk before the reply leaves. Nothing of it is sent.
Importing this imports no tensors: for a step of secure sums a node starts a new process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.node_settings import NodeSettings
from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.secure.step import size_of

if TYPE_CHECKING:
    from flwr.app import RecordDict

    from fedlora import wire

FILE = "sent.jsonl"
MASKED = "train, masked"
"""What is asked of a node whose update goes into a secure sum."""
SESSION = re.compile(r"round (\d{1,9}) of run ([\w.-]{1,80}), ")
"""Beginning of a secure sum's session, see `fedlora.wire.instruction.identity`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One reply.

    Attributes:
        time: when it was ready to leave, UTC, ISO 8601.
        run: the run's key at its clients.
        strategy: the run's.
        round: of the run.
        asked: ``train``, ``evaluate``, `MASKED`, or ``secure`` and the step of secure sums.
        status: ``ok``, ``missing`` (parts that the server sends next), or ``declined``.
        bytes: of its tensors; of a step of its keys, shares and signatures.
        metrics: the numbers in it.
        epsilon: what it says that its run has spent; None where it says nothing.
        reason: why it was declined, in full; the server may have been told less.
    """

    time: str
    run: str
    strategy: str
    round: int
    asked: str
    status: str
    bytes: int
    metrics: dict[str, float]
    epsilon: float | None
    reason: str


def write_down(
    settings: NodeSettings, config: RunConfig, instruction: wire.TrainInstruction, kind: str,
    reply: wire.Reply, content: RecordDict,
) -> None:  # fmt: skip
    """Add a reply to the journal.

    Raises:
        OSError: it cannot be written.
    """
    from clients.store import run_key
    from fedlora import wire

    entry = Sent(
        time=_now(),
        run=run_key(instruction),
        strategy=config.strategy.name,
        round=instruction.server_round,
        asked=MASKED if wire.MASKED in content else kind,
        status=reply.status,
        bytes=wire.payload_bytes(content),
        metrics=dict(reply.metrics),
        epsilon=None if reply.privacy is None else float(reply.privacy["epsilon"]),
        reason=reply.own_reason or reply.reason,
    )
    _append(settings, entry)


def write_step(
    settings: NodeSettings, config: RunConfig, asked: Mapping[str, Any], answer: Mapping[str, Any]
) -> None:
    """Add the answer to a step of secure sums.

    Raises:
        OSError: it cannot be written.
    """
    named = SESSION.match(str(asked.get("session", "")))
    entry = Sent(
        time=_now(),
        run=named[2] if named else "-",
        strategy=config.strategy.name,
        round=int(named[1]) if named else 0,
        asked=f"secure {str(asked.get('phase', '?'))[:20]}",
        status="declined" if "reason" in answer else "ok",
        bytes=0 if "reason" in answer else size_of(answer),
        metrics={},
        epsilon=None,
        reason=str(answer.get("reason", "")),
    )
    _append(settings, entry)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _append(settings: NodeSettings, entry: Sent) -> None:
    from fedlora.core.files import append_line

    settings.home.mkdir(parents=True, exist_ok=True)
    _drop_cut_line(settings.home / FILE)
    append_line(settings.home / FILE, json.dumps(asdict(entry)))


def _drop_cut_line(path: Path) -> None:
    """Take off a last line that was cut short: what it was to tell of did not leave."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        text = stream.read()
        stream.truncate(text.rfind(b"\n") + 1)


def read_journal(home: Path) -> list[Sent]:
    """The replies of a node, the oldest first; a last line that was cut short is left out.

    Raises:
        ConfigError: a line that is none of a journal.
    """
    path = home / FILE
    text = path.read_text(errors="replace") if path.exists() else ""
    found = []
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            found.append(Sent(**json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ConfigError(f"{path}: line {number} is none of a node's journal ({error})") from None
    return found
