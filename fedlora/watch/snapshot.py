"""Where runs and nodes stand, read from their directories while others write there.

Only what is named here is told: no key, no path but the directory's own names, no content of a file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clients.journal import FILE as JOURNAL
from clients.journal import read_journal
from clients.node_settings import NODE_FILE, read_node, state_of
from fedlora.config import read_config
from fedlora.deployment.operator.layout import FAILURE, SERVER_FILE, open_layout
from fedlora.errors import FedLoraError
from fedlora.server.provenance import PROVENANCE
from fedlora.server.results import CONFIG, RESULT, ROUNDS, read_rounds

FAILED, ATTEMPT = "failed.json", (CONFIG, PROVENANCE)
DEPTH = 3
"""Directories below the one that is watched in which runs and nodes are looked for."""
RECENT = 5
"""Last rounds, whose mean length says how long the rest will take."""
SILENT, SLOW = 120.0, 5.0
"""A run is silent after so many seconds without a round, and so many times its rounds' mean length."""
MOST_REFUSALS = 20
"""Of a run, the last ones; all are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stands.

    Attributes:
        name: its directory below the one that is watched.
        state: ``running``, ``silent`` (no round for long), ``finished`` or ``failed``.
        strategy, rounds: of its configuration.
        round: the last one that is done.
        accuracies: after each round that was evaluated, with the round's number.
        last: the last accuracy, loss, perplexity, RMSE and epsilon that were measured.
        target_epsilon: None without a budget.
        bytes_up, bytes_down: of all rounds.
        seconds: of all rounds.
        seconds_left: until its last round; None where nothing says.
        changed: when its last round was written, seconds since 1970.
        refused: how many updates were.
        refusals: round, partition and reason of the last ones.
        seen: partition -> the last round that it took part in.
        reason: why it failed.
    """

    name: str
    state: str
    strategy: str
    rounds: int
    round: int = 0
    accuracies: Sequence[tuple[int, float]] = ()
    last: Mapping[str, float] = field(default_factory=dict)
    target_epsilon: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    seconds_left: float | None = None
    changed: float
    refused: int = 0
    refusals: Sequence[tuple[int, str, str]] = ()
    seen: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """What is known here of a node.

    Attributes:
        name: of its directory.
        partition_id: the partition that it stands for.
        seen: when its last reply was ready, UTC, by its own journal; empty where that is not on this machine.
        asked: what for, with the round.
        declined: how many messages it declined.
        why_declined: the reason that it gave for the last of them.
        epsilon: what its last reply said that its run has spent.
        max_epsilon: its owner's limit; None without one, or where it is not on this machine.
    """

    name: str
    partition_id: int
    seen: str = ""
    asked: str = ""
    declined: int = 0
    why_declined: str = ""
    epsilon: float | None = None
    max_epsilon: float | None = None


class Watcher:
    """Reads a directory again and again; files that did not change are not read again.

    Args:
        path: of a run, a study or a federation; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs: dict[Path, tuple[object, RunState]] = {}
        self._nodes: dict[Path, tuple[object, NodeState]] = {}

    def runs(self) -> list[RunState]:
        """The runs below the directory, by name."""
        homes = [home for home in _below(self.path) if all((home / name).is_file() for name in ATTEMPT)]
        return [run for home in sorted(homes) if (run := self._run(home)) is not None]

    def nodes(self) -> list[NodeState]:
        """The nodes of a federation: those of this machine, and those that the server's file names."""
        found = {node.partition_id: node for node in self._listed()}
        for home in _below(self.path):
            if (home / NODE_FILE).is_file() and (own := self._node(home)) is not None:
                found[own.partition_id] = own
        return [found[partition] for partition in sorted(found)]

    def _listed(self) -> list[NodeState]:
        if not (self.path / "server" / SERVER_FILE).is_file():
            return []
        try:
            entries = open_layout(self.path).nodes
        except FedLoraError:
            return []
        return [NodeState(name=entry.name, partition_id=entry.partition_id) for entry in entries]

    def _run(self, home: Path) -> RunState | None:
        """One run; None while its configuration cannot be read."""
        stamp = _stamp(home, (CONFIG, ROUNDS, RESULT, FAILED, FAILURE))
        if home not in self._runs or self._runs[home][0] != stamp:
            try:
                self._runs[home] = stamp, _read_run(self._name(home), home)
            except (OSError, ValueError, KeyError, TypeError):
                return None
        run = self._runs[home][1]
        quiet = time.time() - run.changed
        longest = max(SILENT, SLOW * run.seconds / max(1, run.round))
        if run.state == "running" and quiet > longest:
            return replace(run, state="silent", seconds_left=None)
        return run

    def _node(self, home: Path) -> NodeState | None:
        try:
            settings = read_node(home)
            state = state_of(home, settings)
            stamp = _stamp(home, (NODE_FILE,)), _stamp(state, (JOURNAL,))
            if home not in self._nodes or self._nodes[home][0] != stamp:
                sent = read_journal(state)
                last = sent[-1] if sent else None
                declined = [entry for entry in sent if entry.status == "declined"]
                epsilons = [entry.epsilon for entry in sent if entry.epsilon is not None]
                self._nodes[home] = (
                    stamp,
                    NodeState(
                        name=home.name,
                        partition_id=settings.partition_id,
                        seen=last.time if last else "",
                        asked=f"{last.asked}, round {last.round}" if last else "",
                        declined=len(declined),
                        why_declined=declined[-1].reason if declined else "",
                        epsilon=epsilons[-1] if epsilons else None,
                        max_epsilon=settings.max_epsilon or None,
                    ),
                )
        except (FedLoraError, OSError, ValueError, TypeError):
            return None
        return self._nodes[home][1]

    def _name(self, home: Path) -> str:
        return self.path.resolve().name if home == self.path else home.relative_to(self.path).as_posix()


def _read_run(name: str, home: Path) -> RunState:
    config, records = read_config(home / CONFIG), read_rounds(home)
    rounds = [r for r in records if r["round"]]
    failure = next((file for file in (home / FAILED, home / FAILURE) if file.is_file()), None)
    left = max(0, config.num_server_rounds - len(rounds))
    state = "finished" if (home / RESULT).is_file() else "failed" if failure else "running"
    lengths = [r["seconds"] for r in rounds[-RECENT:]]
    refusals = [(r["round"], p, str(why)) for r in rounds for p, why in r["refused"].items()]
    written = home / ROUNDS
    return RunState(
        name=name,
        state=state,
        strategy=config.strategy.name,
        rounds=config.num_server_rounds,
        round=rounds[-1]["round"] if rounds else 0,
        accuracies=[(r["round"], r["accuracy"]) for r in rounds if r.get("accuracy") is not None],
        last={
            key: found[-1]
            for key in ("accuracy", "loss", "perplexity", "rmse", "epsilon")
            if (found := [r[key] for r in rounds if r.get(key) is not None])
        },
        target_epsilon=config.privacy.target_epsilon if config.privacy.private else None,
        bytes_up=sum(r["bytes_up"] for r in rounds),
        bytes_down=sum(r["bytes_down"] for r in rounds),
        seconds=sum(r["seconds"] for r in rounds),
        seconds_left=left * sum(lengths) / len(lengths) if lengths and state == "running" else None,
        changed=(written if written.exists() else home / CONFIG).stat().st_mtime,
        refused=len(refusals),
        refusals=refusals[-MOST_REFUSALS:],
        seen={str(p): r["round"] for r in rounds for p in r["participants"]},
        reason=_reason(failure) if failure and state == "failed" else "",
    )


def _reason(file: Path) -> str:
    return str(json.loads(file.read_text()).get("reason", ""))


def _below(path: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The directory and those below it, without hidden ones and links."""
    if not path.is_dir():
        return
    yield path
    if depth:
        for child in sorted(path.iterdir()):
            if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                yield from _below(child, depth - 1)


def _stamp(home: Path, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """What changes when one of the files does."""
    found = []
    for name in names:
        try:
            stat = (home / name).stat()
            found.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append((0, 0))
    return tuple(found)
