"""A client's privacy ledger: every release of a data set, written down before it is made.

One `Chain` for each data set identity (see `fedlora.privacy.datasets`); its lines are

    open                  schema, salt, identity, fingerprint of the content
    reserve               a release: run, round, partition, attempt; noise multiplier, sample rate, steps;
                          the budget it was decided by; for seeded releases a digest of all that
                          determines their bits
    released              its training came to an end
    fingerprint-changed   the content differs from what it was; what was spent stays spent

The order is: `Ledger.reserve`, which is on disk when it returns; training; `Ledger.released`, which is for
reading only. A release that was reserved counts, whether or not anything came of it.
"""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import BudgetExceeded, LedgerRefused
from fedlora.privacy.chain import Chain, Entry, read_chain
from fedlora.privacy.datasets import REGISTER, Dataset, admit
from fedlora.privacy.entries import (
    Release,
    Standing,
    Tally,
    fingerprint_entry,
    open_entry,
    released_entry,
    reserve_entry,
)
from fedlora.privacy.filter import Budget, fits, spent


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

    def reserve(
        self, release: Release, budget: Budget, *, planned_steps: int = 0, known_head: str = ""
    ) -> Standing:
        """Charge a release; on disk when this returns, and only then may it be trained.

        The same seeded release again, with the same ``determined_by``, is the same bits and costs nothing.

        Args:
            release: what is about to be made.
            budget: what all releases together may cost.
            planned_steps: see `fedlora.privacy.filter.fits`.
            known_head: a head that this ledger is known to have had; empty if none is known.

        Raises:
            BudgetExceeded: it would cost more than is left.
            LedgerRefused: the ledger is damaged, rewound, of other data, or not to be opened for these.
        """
        admit(self.directory, self.dataset)
        with self._chain.locked():
            self._open(known_head)
            attempts = self._tally.attempts(release)
            if not (release.determined_by and release.determined_by in attempts):
                self._decide(release, budget, planned_steps)
                self._append(reserve_entry(release, budget, attempt=len(attempts)))
        return self._tally.standing()

    def released(self, release: Release) -> None:
        """Note that the training of the last attempt came to an end.

        Raises:
            LedgerRefused: the ledger was damaged meanwhile.
        """
        with self._chain.locked():
            self._append(released_entry(release), durable=False)

    def check(self, known_head: str = "") -> None:
        """See, without charging anything, that it can be used and continues from a head that it had.

        Raises:
            LedgerRefused: as `reserve`.
        """
        admit(self.directory, self.dataset)
        if not known_head and not self.path.exists():
            return
        with self._chain.locked():
            self._open(known_head)

    def _open(self, known_head: str) -> None:
        chain, dataset = self._chain, self.dataset
        if known_head and known_head not in chain.hashes:
            raise LedgerRefused(
                f"{self.path}: was set back: an entry that it had ({known_head[:12]}) is gone; "
                "restore the file"
            )
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

    def _decide(self, release: Release, budget: Budget, planned_steps: int) -> None:
        history, order = self._tally.with_one_more(release, budget)
        if not fits(history, budget, order, planned_steps):
            epsilon, accountant = spent(history, budget, order)
            steps = sum(steps for _, _, steps in history)
            raise BudgetExceeded(
                f"privacy.target-epsilon = {budget.target_epsilon}: {steps} steps would spend {epsilon:.3f} "
                f"({accountant}), {steps - release.steps} of them in the ledger of {self.dataset.identity}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One ledger, read for its owner."""

    path: Path
    identity: str
    standing: Standing


def read_ledgers(directory: Path) -> list[Account]:
    """All ledgers of a ledger directory by identity; nothing is written or repaired.

    Raises:
        LedgerRefused: one of them is damaged.
    """
    accounts = []
    for path in sorted(directory.glob("*.jsonl")):
        if path.name == REGISTER:
            continue
        tally = Tally(path)
        tally.count(*read_chain(path))
        accounts.append(Account(path=path, identity=tally.identity, standing=tally.standing()))
    return sorted(accounts, key=lambda account: account.identity)


def _file_name(identity: str) -> str:
    """A name that people recognise and that no other identity has."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", identity).strip("-.")[-60:]
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
