"""The last head of each ledger, kept beside the ledger directory, in ``<directory>.heads``.

A ledger that is set back or lost, alone or with its directory, is refused by every later run, and shown to
its owner as such.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

from fedlora.core.sealed import is_digest
from fedlora.errors import LedgerRefused

DRAFT = ".new"


def kept_in(ledger: Path) -> Path:
    """Where the head of a ledger is kept."""
    return _folder(ledger.parent) / ledger.stem


def kept_head(ledger: Path) -> str:
    """The head that was kept of a ledger; empty where there is none, or one that a power cut spoiled."""
    try:
        head = kept_in(ledger).read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
    return head if is_digest(head) else ""


def keep_head(ledger: Path, head: str) -> None:
    """Keep a head.

    It is not flushed: a power cut or a full disk leaves an older one, which the ledger still has.
    """
    kept = kept_in(ledger)
    written = kept.with_name(kept.name + DRAFT)
    try:
        kept.parent.mkdir(exist_ok=True)
        written.write_text(head)
        os.replace(written, kept)
    except OSError as error:
        logging.getLogger("fedlora").warning("%s: %s", kept, error.strerror or error)


def ledgers_known(directory: Path) -> set[Path]:
    """The ledgers of a ledger directory: those that are there, and those of which a head was kept.

    What is there besides, as the register of data sets, is among them.
    """
    files = [file for file in _folder(directory).glob("*") if file.suffix != DRAFT]
    kept = {directory / f"{file.name}.jsonl" for file in files}
    return {*directory.glob("[!.]*.jsonl"), *(ledger for ledger in kept if kept_head(ledger))}


def refuse_set_back(ledger: Path, hashes: Collection[str], head: str, where: str = "") -> None:
    """Refuse a ledger that lost a head which it is known to have had; an empty one is not known.

    Raises:
        LedgerRefused: none of its lines has that hash.
    """
    if head and head not in hashes:
        raise LedgerRefused(
            f"{ledger}: was set back: an entry that it had ({head[:12]}) is gone{where}; restore the file"
        )


def refuse_unlike_kept(ledger: Path, hashes: Collection[str], head: str) -> None:
    """Refuse a ledger that was set back behind the head that was kept of it; say it where none was.

    Raises:
        LedgerRefused: see `refuse_set_back`.
    """
    refuse_set_back(ledger, hashes, head, f" ({kept_in(ledger)} has its hash)")
    if len(hashes) > 1 and not head:
        logging.getLogger("fedlora").warning(
            "%s: is not there, or damaged, which would tell if %s were set back; what that has counts",
            kept_in(ledger), ledger,
        )  # fmt: skip


def _folder(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.heads")
