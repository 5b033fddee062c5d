"""Records with their own hash, and what they say of other files: a changed bit on disk is found and named.

A sealed record is a JSON object whose ``sha256`` is that of all its other entries. It may hold the hashes of
files beside it, tensors by `fedlora.core.base_patches.digest` and bytes by sha256, so that one record vouches
for a whole directory. What a run goes on from is read with its seal alone; a finished run's records may have
lost it on purpose, or be older than seals, which is said.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError

SEAL = "sha256"
FILES_SHA256 = "files_sha256"
"""In a record: of the files beside it that it vouches for, by name."""
_COUNTED: ContextVar[set[Path] | None] = ContextVar("unsealed records", default=None)
"""The records without a seal that were read, where they are counted."""


def is_digest(value: object) -> bool:
    """Whether a value is a SHA-256 in hex."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its hash.

    >>> sorted(sealed({"round": 1}))
    ['round', 'sha256']
    """
    return {**record, SEAL: _hash(record)}


def read_sealed(file: Path, *, older: bool = False) -> dict[str, Any]:
    """The record in a file, without its hash.

    Args:
        file: to read.
        older: a record without a hash is read as it stands, and that is said, unless it vouches for files or
            one of its entries is a hash: then that entry's name was damaged.

    Raises:
        ConfigError: the file is not there, no JSON object, or not what was sealed.
    """
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: {reason_of(error)}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file}: is damaged, it is no JSON") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: is damaged, it is no JSON object")
    has_seal, seal = SEAL in found, found.pop(SEAL, None)
    if not has_seal:
        if not older or FILES_SHA256 in found or any(map(is_digest, found.values())):
            raise ConfigError(f"{file}: has no {SEAL}: it is damaged, or an earlier version wrote it")
        _say_unsealed(file, _hash(found))
    if has_seal and seal != _hash(found):
        raise ConfigError(f"{file}: is damaged, its contents are not those that were written")
    vouched = found.get(FILES_SHA256, {})
    if not isinstance(vouched, dict) or not all(map(is_digest, vouched.values())):
        raise ConfigError(f"{file}: is damaged, {FILES_SHA256} holds something else than hashes of files")
    return found


@contextmanager
def unsealed_counted() -> Iterator[None]:
    """Where many records are read: of those without a seal the first is named, the others are counted."""
    if _COUNTED.get() is not None:
        yield
        return
    files: set[Path] = set()
    token = _COUNTED.set(files)
    try:
        yield
    finally:
        _COUNTED.reset(token)
        if len(files) > 1:
            logging.getLogger("fedlora").warning("%s other records have no %s either", len(files) - 1, SEAL)


@cache
def _say_unsealed(file: Path, content: str) -> None:
    """Say once of each content that nothing vouches for it."""
    counted = _COUNTED.get()
    if counted is not None:
        counted.add(file)
        if len(counted) > 1:
            return
    logging.getLogger("fedlora").warning(
        "%s: has no %s, so that nothing vouches for what it says: an earlier version wrote it, or somebody "
        "took it out; it is read as it stands", file, SEAL,
    )  # fmt: skip


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of some files of a directory, for `FILES_SHA256`."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def changed(folder: Path, record: Mapping[str, Any]) -> Path | None:
    """The first file that a record vouches for and that is not there as it was; None if all are."""
    vouched: dict[str, str] = record.get(FILES_SHA256, {})
    for name, expected in vouched.items():
        file = folder / name
        if not file.is_file() or hashes(folder, [name])[name] != expected:
            return file
    return None


def _hash(record: Mapping[str, Any]) -> str:
    written = json.loads(json.dumps(record))  # keys as they are read again
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


def reason_of(error: OSError) -> str:
    """Why a file could not be read, to follow its name."""
    return "is missing" if isinstance(error, FileNotFoundError) else str(error.strerror or error)
