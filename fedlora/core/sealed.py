"""Records with their own hash, and what they say of other files: a changed bit on disk is found and named.

A sealed record is a JSON object whose ``sha256`` is that of all its other entries. It may hold the hashes of
files beside it, tensors by `fedlora.core.state.digest` and bytes by sha256, so that one record vouches for a
whole directory. What was written before there were seals is read as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load

from fedlora.core.factors import Tensors
from fedlora.core.state import digest
from fedlora.errors import ConfigError

SEAL = "sha256"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its hash.

    >>> sorted(sealed({"round": 1}))
    ['round', 'sha256']
    """
    return {**record, SEAL: _hash(record)}


def read_sealed(file: Path) -> dict[str, Any]:
    """The record in a file, without its hash.

    Raises:
        ConfigError: the file is not there, no JSON object, or not what was sealed.
    """
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: {_reason(error)}") from None
    except ValueError:
        raise ConfigError(f"{file}: is damaged, it is no JSON") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: is damaged, it is no JSON object")
    seal = found.pop(SEAL, None)
    if seal is not None and seal != _hash(found):
        raise ConfigError(f"{file}: is damaged, its contents are not those that were written")
    return found


def read_tensors(file: Path, expected: str | None) -> Tensors:
    """The tensors in a safetensors file.

    Args:
        file: to read.
        expected: their digest; None where it was not kept.

    Raises:
        ConfigError: the file is not there, cannot be read, or holds others.
    """
    try:
        tensors = dict(load(file.read_bytes()))
    except OSError as error:
        raise ConfigError(f"{file}: {_reason(error)}") from None
    except (SafetensorError, ValueError, KeyError):
        raise ConfigError(f"{file}: is damaged, it cannot be read as tensors") from None
    if expected is not None and digest(tensors) != expected:
        raise ConfigError(f"{file}: is damaged, its tensors are not those that were written")
    return tensors


def _hash(record: Mapping[str, Any]) -> str:
    written = json.loads(json.dumps(record))  # keys as they are read again
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


def _reason(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else str(error.strerror or error)
