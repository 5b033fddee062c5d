"""The lines of a privacy ledger: what they say, whether they are well formed, what they add up to."""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fedlora.errors import LedgerRefused
from fedlora.privacy.accountants import ACCOUNTANTS
from fedlora.privacy.chain import Entry
from fedlora.privacy.cut import Cut, read_cut, unlike
from fedlora.privacy.filter import Budget, Setting, dominates
from fedlora.privacy.spending import EvaluationRelease, Place, Release, Spending, Standing
from fedlora.privacy.types import NeighboringRelation

SCHEMA = 1
BEFORE_RELATIONS = {
    "neighboring_relation": NeighboringRelation.ZERO_OUT_ONE.value, "charged_as": None, "unit": "",
}  # fmt: skip
"""Of entries that do not say. Their rate is batch size / examples, so that they hold under no other relation,
although ``add_or_remove_one`` was claimed for them then."""


class Tally:
    """What the lines of a ledger add up to, line by line.

    Args:
        path: the ledger, for what is said about it.

    Attributes:
        identity: of the data set, as the first line has it.
        fingerprint: of its content, as it was found last.
        spending: of all releases.
        head: hash of the last line that is sure to be on disk.
        unit: the column whose values all releases protect, empty for examples; None before the first.
        cut: what made the examples of all entries that say so; None before the first of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = self.fingerprint = self.head = ""
        self.spending = Spending()
        self.unit: str | None = None
        self.cut: Cut | None = None
        self._runs: defaultdict[str, Spending] = defaultdict(Spending)
        self._lines = 0
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

    def attempts(self, release: Release) -> Sequence[str]:
        """What determined the attempts that were made at a release."""
        return self._attempts.get(release.place, [])

    def standing(self, run_key: str | None = None) -> Standing:
        """The sum of all releases, or of those of one run."""
        reserved = Counter({place: len(attempts) for place, attempts in self._attempts.items()})
        unfinished, spending = reserved - self._released, self.spending
        if run_key is not None:
            spending = self._runs.get(run_key, Spending())
            reserved, unfinished = _of_run(reserved, run_key), _of_run(unfinished, run_key)
        return spending.standing(
            releases=reserved.total(),
            unfinished=unfinished.total(),
            content_changes=max(0, self._fingerprints - 1),
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
            case {
                "kind": "evaluate", "run": str(run), "epsilon": float(epsilon),
                "neighboring_relation": relation,
            } if 0 < epsilon < math.inf and relation in list(NeighboringRelation):  # fmt: skip
                if self.unit or not self._cut(entry):
                    return False
                self.unit = ""  # an evaluation hides one example
                for spending in (self.spending, self._runs[run]):
                    spending.add_evaluation(epsilon, NeighboringRelation(relation))
            case _:
                return False
        return not first

    def _reserve(self, entry: Entry, place: Place) -> bool:
        match {**BEFORE_RELATIONS, **entry}:
            case {
                "noise_multiplier": float(noise),
                "sample_rate": float(rate),
                "steps": int(steps),
                "charged_as": charged,
                "neighboring_relation": relation,
                "unit": str(unit),
                "determined_by": str(determined_by),
                "target_epsilon": float(epsilon),
                "target_delta": float(delta),
                "accountant": str(accountant),
            } if 0 < noise < math.inf and 0 < rate <= 1 and steps >= 1 and accountant in ACCOUNTANTS:
                budget = Budget(target_epsilon=epsilon, target_delta=delta, accountant=accountant)
            case _:
                return False
        setting = self._charged(charged, (noise, rate))
        if setting is None or relation not in list(NeighboringRelation) or self.unit not in (None, unit):
            return False
        if not self._cut(entry):
            return False
        self.unit = unit
        for spending in (self.spending, self._runs[place[0]]):
            spending.add(setting, steps, budget, NeighboringRelation(relation))
        self._attempts.setdefault(place, []).append(determined_by)
        return True

    def _cut(self, entry: Entry) -> bool:
        """Whether an entry says of its examples what others say; one that says nothing is as they are."""
        if "cut" not in entry:
            return True
        found = read_cut(entry["cut"])
        if found is None or unlike(found, self.cut):
            return False
        self.cut = found
        return True

    def _charged(self, charged: object, made: Setting) -> Setting | None:
        """The setting that counts: the release's own, or an earlier one that dominates it; else None."""
        match charged:
            case None:
                return made
            case [float(noise), float(rate)] if (noise, rate) in self.spending.steps:
                return (noise, rate) if dominates((noise, rate), made) else None
        return None


def _of_run(places: Counter[Place], run_key: str) -> Counter[Place]:
    return Counter({place: count for place, count in places.items() if place[0] == run_key})


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


def reserve_entry(release: Release, budget: Budget, attempt: int, charged_as: Setting) -> Entry:
    """The line that charges a release."""
    return {
        "kind": "reserve",
        **_placed(release),
        "attempt": attempt,
        "noise_multiplier": float(release.noise_multiplier),
        "sample_rate": float(release.sample_rate),
        "steps": release.steps,
        "charged_as": None if charged_as == release.setting else list(map(float, charged_as)),
        "neighboring_relation": release.neighboring_relation.value,
        **({"unit": release.unit} if release.unit else {}),
        **_cut_of(release),
        "seeded": bool(release.determined_by),
        "determined_by": release.determined_by,
        **dataclasses.asdict(budget),
        "time": now(),
    }


def evaluate_entry(release: EvaluationRelease) -> Entry:
    """The line that charges an evaluation."""
    return {
        "kind": "evaluate",
        "run": release.run_key,
        "round": release.server_round,
        "partition": release.partition_id,
        "epsilon": float(release.epsilon),
        "neighboring_relation": release.neighboring_relation.value,
        **_cut_of(release),
        "time": now(),
    }


def released_entry(release: Release) -> Entry:
    """The line that says that a release's training came to an end."""
    return {"kind": "released", **_placed(release), "time": now()}


def fingerprint_entry(fingerprint: str) -> Entry:
    """The line that says that the content is not what it was."""
    return {"kind": "fingerprint-changed", "fingerprint": fingerprint, "time": now()}


def _cut_of(release: Release | EvaluationRelease) -> Entry:
    return {} if release.cut is None else {"cut": release.cut.record()}


def _placed(release: Release) -> Entry:
    return dict(zip(("run", "round", "partition"), release.place, strict=True))


def now() -> str:
    """For people; nothing depends on it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
