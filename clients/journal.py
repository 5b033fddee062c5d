"""Journal of a node, for its owner: what left the machine, and which messages were declined and why.

A line of ``<state>/sent.jsonl`` for each reply, on disk before the reply leaves. Nothing of it is sent.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import RecordDict

from clients.node_settings import NodeSettings
from clients.store import run_key
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.files import append_line
from fedlora.errors import ConfigError

FILE = "sent.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One reply.

    Attributes:
        time: when it was ready to leave, UTC, ISO 8601.
        run: the run's key at its clients.
        strategy: the run's.
        round: of the run.
        asked: ``train`` or ``evaluate``.
        status: ``ok``, ``missing`` (parts that the server sends next), or ``declined``.
        bytes: of its tensors.
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
    entry = Sent(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run_key(instruction),
        strategy=config.strategy.name,
        round=instruction.server_round,
        asked=kind,
        status=reply.status,
        bytes=wire.payload_bytes(content),
        metrics=dict(reply.metrics),
        epsilon=None if reply.privacy is None else float(reply.privacy["epsilon"]),
        reason=reply.own_reason or reply.reason,
    )
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
