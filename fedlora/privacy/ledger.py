"""A client's privacy ledger: every release of a data set, written down before it is made.

One `Chain` for each data set identity (see `fedlora.privacy.datasets`); its lines are

    open                  schema, salt, identity, fingerprint of the content
    reserve               a release: run, round, partition, attempt; noise multiplier, sample rate, steps;
                          an earlier setting that it is charged as, if that costs less; between which
                          neighbours it holds, and of which unit where that is no example, else what cut
                          the examples from rows; the budget it was decided by; for seeded releases a digest
                          of all that determines their bits
    released              its training came to an end
    evaluate              an evaluation with noise: run, round, partition; its epsilon, at delta 0,
                          between which neighbours, and what cut the examples
    fingerprint-changed   the content differs from what it was; what was spent stays spent

The order is: `Ledger.reserve`, which is on disk when it returns; training; `Ledger.released`, which is for
reading only. A release that was reserved counts, whether or not anything came of it.

The last head of each ledger is also kept beside the directory, see `fedlora.privacy.heads`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from fedlora.errors import BudgetExceeded, LedgerRefused
from fedlora.privacy.chain import Chain, Entry, read_chain
from fedlora.privacy.cut import Cut, unlike
from fedlora.privacy.datasets import REGISTER, Dataset, admit, register_stamp
from fedlora.privacy.entries import (
    Tally,
    evaluate_entry,
    fingerprint_entry,
    open_entry,
    released_entry,
    reserve_entry,
)
from fedlora.privacy.filter import Bounds, Budget, Setting, fits, spent
from fedlora.privacy.heads import keep_head, kept_head, ledgers_known, refuse_set_back, refuse_unlike_kept
from fedlora.privacy.spending import EvaluationRelease, Release, Standing
from fedlora.privacy.types import CLIENT

ROUNDING = 1e-9
"""Of a sum of equal epsilons, relative."""


class Ledger:
    """The ledger of one data set in a ledger directory.

    Args:
        directory: where it lies.
        dataset: whose it is; the first release opens it.
    """

    def __init__(self, directory: Path, dataset: Dataset) -> None:
        self.directory = directory
        self.dataset = dataset
        self.path = directory / _file_name(dataset.identity)
        self._chain = Chain(self.path)
        self._tally = Tally(self.path)
        self._bounds: Bounds = {}
        self._admitted: tuple[int, int] | None = None

    def reserve(
        self,
        release: Release,
        budget: Budget,
        *,
        planned_steps: int = 0,
        known_head: str = "",
        max_delta: float = 1.0,
        max_epsilon: float = math.inf,
        set_aside: float = 0.0,
    ) -> Standing:
        """Charge a release; on disk when this returns, and only then may it be trained.

        The same seeded release again, with the same ``determined_by``, is the same bits and costs nothing.

        Args:
            release: what is about to be made.
            budget: what all releases together may cost.
            planned_steps: see `fedlora.privacy.filter.fits`.
            known_head: a head that this ledger is known to have had; empty if none is known.
            max_delta: the largest delta that may be stated.
            max_epsilon: the owner's limit on all releases and evaluations together, over all runs.
            set_aside: what of it is kept for evaluations.

        Returns:
            What the release's run has spent; what others have is for the owner, see `standing`.

        Raises:
            BudgetExceeded: it would cost more than is left.
            LedgerRefused: the ledger is damaged, rewound, of other data or units, or not to be opened for it.
        """
        self._admit()
        with self._chain.locked():
            self._open(known_head)
            self._check_unit(release.unit, release.cut)
            attempts = self._tally.attempts(release)
            if not (release.determined_by and release.determined_by in attempts):
                aside = max(set_aside, self._tally.spending.on_evaluations)
                left = min(budget.target_epsilon, max_epsilon - aside)
                budget = replace(budget, target_epsilon=left)
                setting = self._decide(release, budget, planned_steps, max_delta)
                self._append(reserve_entry(release, budget, len(attempts), setting))
                keep_head(self.path, self._tally.head)
        return self._tally.standing(release.run_key)

    def reserve_evaluation(
        self,
        release: EvaluationRelease,
        *,
        known_head: str = "",
        max_epsilon: float = math.inf,
        set_aside: float = math.inf,
    ) -> Standing:
        """Charge an evaluation; on disk when this returns, and only then may it be made.

        Evaluations have a share of their own that is set aside beforehand: how many there are may follow
        what was released, how much they and the training may cost does not.

        Args:
            release: what is about to be made.
            known_head: as for `reserve`.
            max_epsilon: as for `reserve`.
            set_aside: the most that all evaluations together may cost.

        Returns:
            What its run has spent.

        Raises:
            BudgetExceeded: it would cost more than is set aside, or training has spent that already.
            LedgerRefused: as `reserve`.
        """
        self._admit()
        with self._chain.locked():
            self._open(known_head)
            self._check_unit("", release.cut)
            standing = self._tally.standing()
            spent, training = standing.on_evaluations, standing.epsilon - standing.on_evaluations
            allowed = min(set_aside, max_epsilon - training) * (1 + ROUNDING)
            if spent + release.epsilon > allowed:
                raise BudgetExceeded(
                    f"evaluation-epsilon = {release.epsilon:g}: evaluations have spent {spent:g} in the "
                    f"ledger of {self.dataset.identity}, training {training:.3f}; set aside are {set_aside:g}"
                )
            self._append(evaluate_entry(release))
            keep_head(self.path, self._tally.head)
        return self._tally.standing(release.run_key)

    def standing(self) -> Standing:
        """What all runs have spent, as far as it was read."""
        return self._tally.standing()

    def released(self, release: Release) -> None:
        """Note that the training of the last attempt came to an end.

        Raises:
            LedgerRefused: the ledger was damaged meanwhile.
        """
        with self._chain.locked():
            self._append(released_entry(release), durable=False)

    def check(self, known_head: str = "", unit: str = "", cut: Cut | None = None) -> None:
        """See, without charging anything, that it can be used for a unit and continues from a head it had.

        Raises:
            LedgerRefused: as `reserve`.
        """
        self._admit()
        if not known_head and not self.path.exists() and not kept_head(self.path):
            return
        with self._chain.locked():
            self._open(known_head)
            self._check_unit(unit, cut)

    def _admit(self) -> None:
        """Ask the register, unless it is as it was when it last admitted the data set.

        A directory that was deleted with its heads begins anew, as it would in another process.
        """
        found = register_stamp(self.directory)
        if found is not None and found == self._admitted:
            return
        admit(self.directory, self.dataset)
        self._admitted = register_stamp(self.directory)
        if not self.path.exists() and not kept_head(self.path):
            self._chain, self._tally = Chain(self.path), Tally(self.path)

    def _check_unit(self, unit: str, cut: Cut | None) -> None:
        """Refuse to add up what protects examples and people, or unlike examples: no epsilon is of both."""
        if self._tally.unit not in (None, unit):
            key = "privacy.mode = 'client'" if unit == CLIENT else f"privacy.unit-column = {unit!r}"
            raise LedgerRefused(
                f"{key}: {self.path} has releases for {self._tally.unit!r}; what is "
                "spent on one kind of unit does not add up with another, so keep it or use another ledger"
            )
        if differing := unlike(cut, self._tally.cut):
            now, before = differing
            raise LedgerRefused(
                f"{now}: {self.path} has releases for examples by {before}; what is "
                "spent on one kind of unit does not add up with another, so keep it or use another ledger"
            )

    def _open(self, known_head: str) -> None:
        chain, dataset = self._chain, self.dataset
        refuse_set_back(self.path, chain.hashes, known_head)
        refuse_unlike_kept(self.path, chain.hashes, kept_head(self.path))
        if not chain.entries:
            self._append(open_entry(dataset.identity, dataset.fingerprint))
        self._tally.count(chain.entries, chain.hashes)
        if self._tally.identity != dataset.identity:
            raise LedgerRefused(
                f"{self.path}: is the ledger of {self._tally.identity}, not of {dataset.identity}"
            )
        if self._tally.fingerprint != dataset.fingerprint:
            logging.getLogger("fedlora").warning(
                "%s: the content of %s is not what it was; what was spent on it stays spent",
                self.path, dataset.identity,
            )  # fmt: skip
            self._append(fingerprint_entry(dataset.fingerprint))

    def _append(self, entry: Entry, *, durable: bool = True) -> None:
        self._chain.append(entry, durable=durable)
        self._tally.count(self._chain.entries, self._chain.hashes)

    def _decide(self, release: Release, budget: Budget, planned_steps: int, max_delta: float) -> Setting:
        spending = self._tally.spending
        setting = spending.charged_as(release, budget)
        history, order, delta = spending.with_one_more(setting, release.steps, budget)
        if delta > max_delta:
            raise BudgetExceeded(
                f"privacy.target-delta = {budget.target_delta:g}: noise or rate changed in the ledger of "
                f"{self.dataset.identity}, so that delta {delta:g} would be stated, allowed is {max_delta:g}"
            )
        if not fits(history, budget, order, self._bounds, planned_steps):
            epsilon, accountant = spent(history, budget, order)
            steps = sum(steps for _, _, steps in history)
            raise BudgetExceeded(
                f"privacy.target-epsilon = {budget.target_epsilon}: {steps} steps would spend {epsilon:.3f} "
                f"({accountant}), {steps - release.steps} of them in the ledger of {self.dataset.identity}"
            )
        return setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One ledger, read for its owner; ``unit`` as in `Tally`."""

    path: Path
    identity: str
    standing: Standing
    unit: str | None


def read_ledgers(directory: Path) -> list[Account]:
    """All ledgers of a ledger directory by identity; nothing is written or repaired.

    Raises:
        LedgerRefused: one of them is damaged, was set back, or is gone.
    """
    accounts = []
    for path in sorted(ledgers_known(directory) - {directory / REGISTER}):
        head = kept_head(path)  # before the chain, which may be growing
        entries, hashes = read_chain(path)
        refuse_unlike_kept(path, hashes, head)
        tally = Tally(path)
        tally.count(entries, hashes)
        accounts.append(
            Account(path=path, identity=tally.identity, standing=tally.standing(), unit=tally.unit)
        )
    return sorted(accounts, key=lambda account: account.identity)


def _file_name(identity: str) -> str:
    """A name that people recognise and that no other identity has."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", identity).strip("-.")[-60:]
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
