"""Which data sets a ledger directory keeps account of: declared by their owner, never found by content.

``<ledger>/datasets.jsonl`` is a `Chain`. The first data set of a directory is there by its first use;
every other one needs the owner's ``fedlora privacy new-dataset``, so that no change of a configuration
gives spent data a fresh budget. A data set that is dealt to several clients has one ledger for each
partition and one partitioning for good: under another, an example would sit in two ledgers. So it would where
examples are dealt after they were cut from rows, and are cut otherwise; a register that does not say what cut
them takes what comes next, and holds to it.
"""

from __future__ import annotations

import getpass
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedlora.errors import ConfigError, LedgerRefused
from fedlora.privacy.chain import Chain, Entry
from fedlora.privacy.cut import Cut, read_cut, unlike
from fedlora.privacy.heads import ledgers_known

REGISTER = "datasets.jsonl"
SCHEMA = 1
FIRST_USE = "first use"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The examples that one ledger keeps account of.

    Attributes:
        source: the data set, as its owner calls it.
        partitioning: names how it is dealt to clients; empty where it is not.
        part: which of the parts this is; empty where there is only one.
        fingerprint: of the content; it warns of a change and decides nothing.
        cut: what made the examples before they were dealt; None where that does not decide who has which.
    """

    source: str
    partitioning: str = ""
    part: str = ""
    fingerprint: str = ""
    cut: Cut | None = None

    @property
    def identity(self) -> str:
        return "/".join(filter(None, (self.source, self.partitioning, self.part)))


@dataclass(frozen=True, slots=True)
class _Dealt:
    """How a register has a data set dealt; ``cut`` as in `Dataset`, None where it does not say."""

    partitioning: str
    cut: Cut | None


def admit(directory: Path, dataset: Dataset) -> None:
    """See to it that a ledger may be opened for these examples.

    Raises:
        LedgerRefused: a data set that the owner did not declare, or another partitioning of one.
    """
    register = Chain(directory / REGISTER)
    with register.locked():
        declared = _declared(register)
        if not declared and (ledgers := ledgers_known(directory) - {register.path}):
            raise LedgerRefused(
                f"{register.path}: is missing, which says of what {min(ledgers).name} keeps account; restore "
                "the file"
            )
        if dataset.source not in declared:
            if declared:
                raise LedgerRefused(_undeclared(directory, dataset.source, declared))
            _declare(register, dataset.source, FIRST_USE, "")
        known = declared.get(dataset.source)
        if known is not None:
            _refuse_dealt_otherwise(directory, dataset, known)
        if known is None or (known.cut is None and dataset.cut is not None):
            register.append(_partitioning_entry(dataset))


def register_stamp(directory: Path) -> tuple[int, int] | None:
    """Time and size of a directory's register; None where there is none."""
    try:
        found = (directory / REGISTER).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def declare(directory: Path, source: str, reason: str) -> None:
    """The owner's word that this is another data set; logged with who said it and why.

    Raises:
        ConfigError: no name, no reason, or a data set that is there already.
        LedgerRefused: the register is damaged.
    """
    for option, value in (("--id", source), ("--reason", reason)):
        if not value.strip() or not value.isprintable():
            raise ConfigError(f"{option} {value!r}: must be one line of text")
    register = Chain(directory / REGISTER)
    with register.locked():
        if source in _declared(register):
            raise ConfigError(f"--id {source!r}: is in {directory} already, with what was spent on it")
        _declare(register, source, _user(), reason)


def declared_in(directory: Path) -> list[str]:
    """The data sets of a ledger directory, in the order in which they came; nothing is written or repaired.

    Raises:
        LedgerRefused: the register is damaged.
    """
    register = Chain(directory / REGISTER)
    register.refresh()
    return list(_declared(register))


def _refuse_dealt_otherwise(directory: Path, dataset: Dataset, known: _Dealt) -> None:
    """Refuse what would put an example into two ledgers."""
    place = f"privacy.ledger = {str(directory)!r}"
    if known.partitioning != dataset.partitioning:
        raise LedgerRefused(
            f"{place}: {dataset.source!r} is dealt to clients as "
            f"{known.partitioning or 'one part'} there, now as {dataset.partitioning or 'one part'}, and an "
            "example would be in two ledgers; keep the partitioning and its seed, or use another ledger"
        )
    if differing := unlike(dataset.cut, known.cut):
        now, before = differing
        raise LedgerRefused(
            f"{now}: {place} has {dataset.source!r} dealt to clients by {before}, and what is in an example "
            "would be in two ledgers; keep it, or use another ledger"
        )


def _partitioning_entry(dataset: Dataset) -> Entry:
    entry = {"kind": "partitioning", "source": dataset.source, "partitioning": dataset.partitioning}
    return entry if dataset.cut is None else {**entry, "cut": dataset.cut.record()}


def _declare(register: Chain, source: str, by: str, reason: str) -> None:
    if not register.entries:
        register.append({"kind": "open", "schema": SCHEMA})
    time = datetime.now(UTC).isoformat(timespec="seconds")
    register.append({"kind": "declare", "source": source, "by": by, "reason": reason, "time": time})


def _declared(register: Chain) -> dict[str, _Dealt | None]:
    """Data set -> how it is dealt, None before its first use.

    Raises:
        LedgerRefused: it is not a register of this version.
    """
    declared: dict[str, _Dealt | None] = {}
    for number, entry in enumerate(register.entries):
        match entry:
            case {"kind": "open", "schema": schema} if number == 0 and schema == SCHEMA:
                continue
            case {"kind": "declare", "source": str(source)} if number > 0:
                declared[source] = None
            case {"kind": "partitioning", "source": str(source), "partitioning": str(partitioning)} if (
                source in declared and ("cut" not in entry or read_cut(entry["cut"]) is not None)
            ):
                declared[source] = _Dealt(partitioning, read_cut(entry.get("cut")))
            case _:
                raise LedgerRefused(
                    f"{register.path}: line {number + 1} is not one of a register of this version"
                )
    return declared


def _undeclared(directory: Path, source: str, declared: Collection[str]) -> str:
    there = ", ".join(map(repr, declared))
    return (
        f"privacy.ledger = {str(directory)!r}: keeps account of {there}, not of {source!r}; if that is other "
        f"data, its owner says so: fedlora privacy new-dataset --ledger {directory} --id {source} "
        "--reason TEXT"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return "unknown"
