"""What a study would run, before anything does; nothing is written but prepared data in the cache."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

from clients.runtime import Key, key_of
from fedlora.config import RunConfig
from fedlora.core.files import check_place
from fedlora.core.sealed import unsealed_counted
from fedlora.errors import FedLoraError
from fedlora.server.expected import duration, expected_seconds, memory, pace_of
from fedlora.server.identity import config_digest
from fedlora.server.preview import Line, preview
from fedlora.simulation.places import actors_of
from fedlora.study.analyse.results import finished
from fedlora.study.execute.cell import Engine, say
from fedlora.study.execute.parallel import check_parallel
from fedlora.study.execute.reuse import ResultCache, check_inputs
from fedlora.study.execute.runner import check_directories, check_request, planned, trials_of
from fedlora.study.plan.absent import read_failure
from fedlora.study.plan.cells import Cell
from fedlora.study.plan.judged import judged_by

HEADER = ("method", "runs", "to run", "clients", "MB up", "MB down", "epsilon", "time a run")
"""Clients and MB are of a round, the first one; time is that of one process."""
OF_THE_FILE = ("model", "data", "labels", "targets", "clients", "training")
"""Lines of the first run's preview that are shown for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The runs of one method under one setting, or the trials of one rate.

    Attributes:
        name: of the group.
        runs: how many there are.
        to_run: those that would run.
        clients: that a round asks.
        bytes_up, bytes_down: of the first round.
        epsilon: that is planned; None without a budget.
        seconds: of a run, if one process does all of it.
    """

    name: str
    runs: int
    to_run: int
    clients: int
    bytes_up: float
    bytes_down: float
    epsilon: float | None
    seconds: float

    def cells(self) -> tuple[str, ...]:
        """A text for each column of `HEADER`."""
        return (
            self.name, str(self.runs), str(self.to_run), str(self.clients), f"{self.bytes_up / 1e6:.3g}",
            f"{self.bytes_down / 1e6:.3g}", "none" if self.epsilon is None else f"{self.epsilon:g}",
            duration(self.seconds),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outlook:
    """A study before it runs.

    Attributes:
        lines: a heading and a sentence each.
        groups: a row for each method under each setting, and before them for each rate that is tried.
    """

    lines: Sequence[Line]
    groups: Sequence[Group]

    @property
    def ending(self) -> list[Line]:
        """Time of all that is to run, and memory."""
        seconds = sum(group.to_run * group.seconds for group in self.groups)
        left = sum(group.to_run for group in self.groups)
        time = f"about {duration(seconds)} for what is to run, if one process trains" if left else "none"
        return [("time", time), memory()]


@unsealed_counted()
def outlook(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    share: Sequence[Path] = (),
    parallel: int = 1,
) -> Outlook:
    """What `fedlora.study.execute.runner.run_study` would do with the same arguments.

    Each method is tried for two steps of one client, evaluation for a few examples.

    Raises:
        ConfigError: as `run_study`.
    """
    check_place("--out", path)
    shared = check_request(config, path, share, resume=resume)
    if parallel > 1 and not config.engine.address:
        check_parallel(parallel, actors_of(config.engine, [{"CPU": os.cpu_count() or 1}]))
    with Engine(replace(config, engine=replace(config.engine, name="in-process"))) as engine:
        cells, absent = planned(engine, config)
        trials = [trial.cell for trial in trials_of(config, cells)]
        check_directories(trials or cells, path)
        check_inputs(engine, trials or cells, path, retry_failed=retry_failed)
        state = _State.of(engine, [*trials, *cells], path, shared, retry_failed=retry_failed)
        groups, fails, about = _groups(engine, [*trials, *cells], state)
    seeds = sorted({cell.seed for cell in cells})
    lines = [
        ("study", f"{_counted(len(cells), 'run')}, seeds {', '.join(map(str, seeds))}, judged by "
         f"{judged_by(config.study, cells).name}"),
        *([("tuning", f"{_counted(len(trials), 'trial')} first, for learning rates")] if trials else []),
        *state.lines(path),
        *[("left out", f"{group}, {_counted(number, 'run')}: not applicable ({reason})")
          for (group, reason), number in Counter((a.group, a.reason) for a in absent).items()],
        *[("fails", f"{group}: {reason}") for group, reason in fails.items()],
        *[(heading, text.partition(", ")[2] if heading == "training" else text)  # which begins with its rule
          for heading, text in about if heading in OF_THE_FILE],
    ]  # fmt: skip
    return Outlook(lines, groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """Labels of the runs that would not run, and of those that would."""

    done: list[str]
    failed: dict[str, str]
    taken: dict[str, Path]
    to_run: list[str]

    @classmethod
    def of(
        cls, engine: Engine, cells: Sequence[Cell], path: Path, shared: Sequence[Path], *, retry_failed: bool
    ) -> _State:
        """Where the runs stand, each by the first that is true of it."""
        done = [cell.label for cell in cells if finished(path / cell.label)]
        rest = [cell for cell in cells if cell.label not in done]
        why = {} if retry_failed else {cell.label: read_failure(path / cell.label) for cell in rest}
        failed = {label: reason for label, reason in why.items() if reason is not None}
        shelf = ResultCache(cells, path, shared, say)
        taken: dict[str, Path] = {}
        to_run: dict[str, Path] = {}
        for cell in rest:
            if cell.label in failed:
                continue
            home = path / cell.label
            source = None if home.exists() else shelf.find(cell, partial(engine.inputs, cell.config, home))
            if source is None:
                source = to_run.get(config_digest(cell.config))
            if source is None:
                to_run[config_digest(cell.config)] = home
            else:
                taken[cell.label] = source
        return cls(done=done, failed=failed, taken=taken, to_run=[home.name for home in to_run.values()])

    def lines(self, path: Path) -> list[Line]:
        """What would not run, and why."""
        found = [("finished", f"{_counted(len(self.done), 'run')} in {path}")] if self.done else []
        for study, number in Counter(home.parent for home in self.taken.values()).items():
            where = "others of this study" if study == path else os.path.relpath(study)
            found.append(("taken", f"{_counted(number, 'run')} from {where}: same configuration, same code"))
        return found + [
            ("failed", f"{label}: {reason}; left alone without --retry-failed")
            for label, reason in self.failed.items()
        ]


def _groups(
    engine: Engine, cells: Sequence[Cell], state: _State
) -> tuple[list[Group], dict[str, str], list[Line]]:
    """A row for each group; those that would fail at once, and why; lines on the first that would not."""
    examples: dict[Key, float] = {}
    rows: list[Group] = []
    fails: dict[str, str] = {}
    about: list[Line] = []
    for name in dict.fromkeys(cell.group for cell in cells):
        own = [cell for cell in cells if cell.group == name]
        config = own[0].config
        try:
            run = preview(config, engine.pool.runtime(config))
        except FedLoraError as error:
            fails[name] = str(error)
            continue
        about = about or run.lines()
        pace = pace_of(run, examples.get(key_of(config)))
        examples[key_of(config)] = pace.example
        up, down = (run.in_a_round * fmean(sent) for sent in run.traffic())
        rows.append(Group(
            name=name, runs=len(own), to_run=sum(cell.label in state.to_run for cell in own),
            clients=run.in_a_round, bytes_up=up, bytes_down=down,
            epsilon=config.privacy.target_epsilon if config.privacy.private else None,
            seconds=expected_seconds(run, pace),
        ))  # fmt: skip
    return rows, fails, about


def _counted(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"
