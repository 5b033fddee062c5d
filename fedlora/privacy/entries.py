"""The lines of a privacy ledger: what they say, whether they are well formed, what they add up to."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedlora.errors import LedgerRefused
from fedlora.privacy.accountants import ACCOUNTANTS, History
from fedlora.privacy.chain import Entry
from fedlora.privacy.filter import Budget, first_order, spent

SCHEMA = 1
Place = tuple[str, int, int]
"""Run, round, partition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What is about to leave a client.

    Attributes:
        run_key, server_round, partition_id: where it belongs.
        noise_multiplier: noise standard deviation / clipping norm.
        sample_rate: probability with which an example is in a batch.
        steps: optimiser steps.
        determined_by: a digest of all that determines its bits; empty where they come from real entropy.
    """

    run_key: str
    server_round: int
    partition_id: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    determined_by: str = ""

    @property
    def place(self) -> Place:
        return self.run_key, self.server_round, self.partition_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is on a ledger.

    Attributes:
        epsilon: spent, at the delta of the last release's budget.
        accountant: by which.
        steps: optimiser steps of all releases.
        releases: how many, unfinished ones included.
        unfinished: reserved ones whose training did not come to an end, or not yet.
        content_changes: how often the content was found changed.
        budget: the last release's; None before the first.
        head: hash of the last line that is sure to be on disk.
    """

    epsilon: float
    accountant: str
    steps: int
    releases: int
    unfinished: int
    content_changes: int
    budget: Budget | None
    head: str


class Tally:
    """What the lines of a ledger add up to, line by line.

    Args:
        path: the ledger, for what is said about it.

    Attributes:
        identity: of the data set, as the first line has it.
        fingerprint: of its content, as it was found last.
        budget: of the last release; None before the first.
        head: hash of the last line that is sure to be on disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = self.fingerprint = self.head = ""
        self.budget: Budget | None = None
        self._lines = 0
        self._order = math.nan
        self._steps: Counter[tuple[float, float]] = Counter()
        self._attempts: dict[Place, list[str]] = {}
        self._released: Counter[Place] = Counter()
        self._fingerprints = 0

    def count(self, entries: Sequence[Entry], hashes: Sequence[str]) -> None:
        """Go on to the end of a ledger's lines.

        Raises:
            LedgerRefused: they are not those of a ledger of this version.
        """
        for number in range(self._lines, len(entries)):
            if not self._add(entries[number], first=number == 0):
                raise LedgerRefused(
                    f"{self.path}: line {number + 1} is not one of a privacy ledger of this version"
                )
            if entries[number]["kind"] != "released":
                self.head = hashes[number]
            self._lines = number + 1

    @property
    def history(self) -> History:
        """Steps of all releases, summed for each noise and rate in the order of their first use."""
        return tuple((noise, rate, steps) for (noise, rate), steps in self._steps.items())

    def attempts(self, release: Release) -> Sequence[str]:
        """What determined the attempts that were made at a release."""
        return self._attempts.get(release.place, [])

    def with_one_more(self, release: Release, budget: Budget) -> tuple[History, float]:
        """The history and the Renyi order if the release is made under that budget."""
        setting = (release.noise_multiplier, release.sample_rate)
        steps = self._steps + Counter({setting: release.steps})
        order = self._order if self._steps else first_order(*setting, budget)
        return tuple((noise, rate, count) for (noise, rate), count in steps.items()), order

    def standing(self) -> Standing:
        """The sum; epsilon is computed here."""
        epsilon, accountant = 0.0, ""
        if self.budget is not None:
            epsilon, accountant = spent(self.history, self.budget, self._order)
        reserved = Counter({place: len(attempts) for place, attempts in self._attempts.items()})
        return Standing(
            epsilon=epsilon,
            accountant=accountant,
            steps=self._steps.total(),
            releases=reserved.total(),
            unfinished=(reserved - self._released).total(),
            content_changes=max(0, self._fingerprints - 1),
            budget=self.budget,
            head=self.head,
        )

    def _add(self, entry: Entry, *, first: bool) -> bool:
        """Whether the entry is well formed and in its place; if so, it is counted."""
        match entry:
            case {"kind": "open", "schema": schema, "identity": str(identity), "fingerprint": str(content)}:
                self.identity, self.fingerprint = identity, content
                self._fingerprints += 1
                return first and bool(schema == SCHEMA)
            case {"kind": "fingerprint-changed", "fingerprint": str(content)}:
                self.fingerprint = content
                self._fingerprints += 1
            case {"kind": "released", "run": str(run), "round": int(number), "partition": int(partition)}:
                self._released[run, number, partition] += 1
            case {"kind": "reserve", "run": str(run), "round": int(number), "partition": int(partition)}:
                return not first and self._reserve(entry, (run, number, partition))
            case _:
                return False
        return not first

    def _reserve(self, entry: Entry, place: Place) -> bool:
        match entry:
            case {
                "noise_multiplier": float(noise),
                "sample_rate": float(rate),
                "steps": int(steps),
                "determined_by": str(determined_by),
                "target_epsilon": float(epsilon),
                "target_delta": float(delta),
                "accountant": str(accountant),
            } if 0 < noise < math.inf and 0 < rate <= 1 and steps >= 1 and accountant in ACCOUNTANTS:
                budget = Budget(target_epsilon=epsilon, target_delta=delta, accountant=accountant)
            case _:
                return False
        if not self._steps:
            self._order = first_order(noise, rate, budget)
        self.budget = budget
        self._steps[noise, rate] += steps
        self._attempts.setdefault(place, []).append(determined_by)
        return True


def open_entry(identity: str, fingerprint: str) -> Entry:
    """The first line.

    A head of the ledger goes to the server, and is a hash of this line and all after it. The salt keeps
    whoever guesses the content from recognising its fingerprint there.
    """
    return {
        "kind": "open",
        "schema": SCHEMA,
        "salt": secrets.token_hex(16),
        "identity": identity,
        "fingerprint": fingerprint,
        "time": now(),
    }


def reserve_entry(release: Release, budget: Budget, attempt: int) -> Entry:
    """The line that charges a release."""
    return {
        "kind": "reserve",
        **_placed(release),
        "attempt": attempt,
        "noise_multiplier": float(release.noise_multiplier),
        "sample_rate": float(release.sample_rate),
        "steps": release.steps,
        "seeded": bool(release.determined_by),
        "determined_by": release.determined_by,
        **dataclasses.asdict(budget),
        "time": now(),
    }


def released_entry(release: Release) -> Entry:
    """The line that says that a release's training came to an end."""
    return {"kind": "released", **_placed(release), "time": now()}


def fingerprint_entry(fingerprint: str) -> Entry:
    """The line that says that the content is not what it was."""
    return {"kind": "fingerprint-changed", "fingerprint": fingerprint, "time": now()}


def _placed(release: Release) -> Entry:
    return dict(zip(("run", "round", "partition"), release.place, strict=True))


def now() -> str:
    """For people; nothing depends on it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
