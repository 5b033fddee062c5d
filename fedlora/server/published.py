"""What a run has published under noise that nobody can draw again, counted outside its checkpoints.

Client-level noise is seeded in simulation alone. Elsewhere a round that is done again has other noise and is
another release: after a crash between a round and its checkpoint, and where a run goes on from an earlier
one. What the first pass published has left the server, so both count. ``published.jsonl`` has a line for each
release, on disk before anything of it leaves the strategy:

    {"round": 5, "participations": {"0": 5, "1": 4}}

with the rounds that each client was asked for in this release and all before it, so that the last line says
all. It is never set back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.core.files import append_line, write_atomic
from fedlora.core.state import ServerState
from fedlora.errors import ConfigError
from fedlora.server.best import Records, has_ended
from fedlora.server.results import PUBLISHED, read_lines


def append_release(path: Path, server_round: int, participations: Mapping[int, int]) -> None:
    """Add the line of a release that is about to be made, flushed to disk.

    Raises:
        OSError: the system refuses; nothing may be published then.
    """
    line = {"round": server_round, "participations": dict(sorted(participations.items()))}
    append_line(path / PUBLISHED, json.dumps(line))


def read_participations(path: Path) -> dict[int, int]:
    """Participations in all that a run directory's run has published; empty where nothing is counted here.

    A half-written last line is left out: its release was not made.

    Raises:
        ConfigError: the file is damaged.
    """
    lines = read_lines(path / PUBLISHED)
    found = lines[-1].get("participations") if lines else {}
    if not isinstance(found, dict) or not all(p.isdecimal() and type(n) is int for p, n in found.items()):
        raise ConfigError(
            f"{path / PUBLISHED}: is damaged, its last line has no participations; put it back, or begin "
            "anew elsewhere"
        )
    return {int(partition): rounds for partition, rounds in found.items()}


def drop_half_line(path: Path) -> None:
    """Remove a last line that was not written to its end, so that the next one stands alone."""
    file = path / PUBLISHED
    written = file.read_bytes() if file.exists() else b""
    if written and not written.endswith(b"\n"):
        write_atomic(file, written[: written.rfind(b"\n") + 1])


def counted(
    config: RunConfig, checkpoint: ServerState | None, published: Mapping[int, int], records: Records
) -> dict[int, int]:
    """Participations that a run goes on from: the checkpoint's, and those that were published beyond it.

    Args:
        config: of the run.
        checkpoint: what it goes on from.
        published: see `read_participations`.
        records: the lines of ``rounds.jsonl``.

    Raises:
        ConfigError: what was published beyond the checkpoint has noise of which a round has one row, or no
            round is left whose record would charge it.
    """
    done = 0 if checkpoint is None else checkpoint.state.round
    before = {} if checkpoint is None else checkpoint.participations
    after = before | {p: max(before.get(p, 0), rounds) for p, rounds in published.items()}
    if after == before:
        return after
    if config.privacy.noise_bands > 1:
        raise ConfigError(
            f"privacy.noise-bands = {config.privacy.noise_bands}: a model after round {done} was published, "
            f"and the noise of a round serves once; {PUBLISHED} says so, begin anew elsewhere"
        )
    if config.num_server_rounds <= done or has_ended(config, [r for r in records if r["round"] <= done]):
        raise ConfigError(
            f"num-server-rounds = {config.num_server_rounds}: a model after round {done} was published, and "
            "no round is left whose record charges it; allow one more round"
        )
    return after
