"""An append-only file of JSON lines in which every line carries the sha256 of the line before it.

What `Chain.append` returned from is on disk, and stays counted after ``kill -9`` or a power cut at any
byte: a write that was cut short leaves a last line without its end, of which nobody was told yet. Every
other departure from the chain (a line changed, lost, put in from elsewhere) is refused. Hashes guard
against accidents, not against the owner of the file. Times of day play no part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedlora.core.files import write_atomic
from fedlora.errors import LedgerRefused

LOCK_SECONDS = 60.0
"""The lock is held for milliseconds, and the system frees it when its holder dies."""

Entry = dict[str, Any]


class Chain:
    """One such file as far as it was read; other processes may append to it at the same time.

    Attributes:
        path: the file; the first entry makes it.
        entries: what the lines say, in order.
        hashes: the sha256 of each line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.hashes: list[str] = []
        self._last_line = b""
        self._size = 0
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, nobody else writes, and ``entries`` has everything that others wrote before.

        Raises:
            LedgerRefused: the file is damaged, cannot be written, or stays locked.
        """
        try:
            _make_directory(self.path.parent)
            with self._lock:
                self._mend(self.refresh())
                yield
        except Timeout:
            raise LedgerRefused(f"{self.path}: another process has held it for {LOCK_SECONDS:g} s") from None
        except OSError as error:
            raise LedgerRefused(f"{self.path}: {error.strerror or error}") from None

    def append(self, entry: Mapping[str, Any], *, durable: bool = True) -> str:
        """Add a line; only inside `locked`.

        Args:
            entry: what the line says.
            durable: on disk when this returns. Otherwise a power cut may lose the line, unless a
                durable one was appended after it.

        Returns:
            The hash of the line.
        """
        line = json.dumps({**entry, "previous": self._last}).encode()
        if self.entries:
            _append(self.path, line + b"\n", durable=durable)
        else:
            write_atomic(self.path, line + b"\n")
            _flush_directory(self.path.parent)
        self.take(line)
        return self._last

    def refresh(self) -> bytes:
        """Read on to the end of the file.

        Returns:
            What follows the last whole line: nothing, but for a write that was cut short.

        Raises:
            LedgerRefused: a line does not follow the one before it, or what was read before changed.
        """
        data = self._read()
        if data is None and not self.entries:
            return b""
        if data is None or not data.startswith(self._last_line):
            raise LedgerRefused(f"{self.path}: lost or changed entries while it was in use; restore the file")
        *lines, rest = data[len(self._last_line) :].split(b"\n")
        for line in lines:
            self.take(line)
        if not self.entries:
            raise LedgerRefused(f"{self.path}: its first line is damaged; restore the file")
        return rest

    def whole(self, line: bytes) -> Entry | None:
        """The entry that a line holds if it follows the lines so far, else None."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return entry if isinstance(entry, dict) and entry.get("previous") == self._last else None

    @property
    def _last(self) -> str:
        return self.hashes[-1] if self.hashes else ""

    def _read(self) -> bytes | None:
        """The file from the last line that was read, or None if there is no file."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._size - len(self._last_line))
                return stream.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LedgerRefused(f"{self.path}: {error.strerror or error}") from None

    def take(self, line: bytes) -> None:
        """Count a line, given without its end.

        Raises:
            LedgerRefused: it does not follow the lines so far.
        """
        entry = self.whole(line)
        if entry is None:
            raise LedgerRefused(
                f"{self.path}: line {len(self.entries) + 1} is damaged or does not follow the one before it; "
                "restore the file"
            )
        self.entries.append(entry)
        self.hashes.append(hashlib.sha256(line).hexdigest())
        self._last_line = line + b"\n"
        self._size += len(self._last_line)

    def _mend(self, rest: bytes) -> None:
        """Give a last line that is whole its end; cut off one that is not, which nobody relied upon."""
        if not rest:
            return
        if self.whole(rest) is not None:
            _append(self.path, b"\n", durable=True)
            self.take(rest)
            return
        logging.getLogger("fedlora").warning(
            "%s: %d bytes of a write that was cut short are dropped", self.path, len(rest)
        )
        with self.path.open("r+b") as stream:
            stream.truncate(self._size)
            os.fsync(stream.fileno())


def read_chain(path: Path) -> tuple[list[Entry], list[str]]:
    """All entries of a file and their hashes; the file is left as it is.

    Raises:
        LedgerRefused: there is no such file, or it is damaged.
    """
    chain = Chain(path)
    rest = chain.refresh()
    if rest and chain.whole(rest) is not None:
        chain.take(rest)
    if not chain.entries:
        raise LedgerRefused(f"{path}: there is no such file")
    return chain.entries, chain.hashes


def _append(path: Path, data: bytes, *, durable: bool) -> None:
    with path.open("ab") as stream:
        stream.write(data)
        stream.flush()
        if durable:
            os.fsync(stream.fileno())


def _make_directory(directory: Path) -> None:
    """Make it and its parents so that they outlive a power cut."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _flush_directory(path.parent)


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
