"""What a run directory's records say, read back and held against the hashes that they carry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora.core.sealed import FILES_SHA256, changed, read_sealed
from fedlora.errors import ConfigError

RESULT = "result.json"
"""Written last: a run without it is not finished."""
CONFIG = "config.toml"
ROUNDS = "rounds.jsonl"
PUBLISHED = "published.jsonl"
"""What was published under noise of the system, see `fedlora.server.published`."""
SAMPLES = "samples.json"
BEFORE = "before.json"
RUN_KEY = "run-key.txt"
"""What clients and ledgers know the run by, from before its first round."""


def read_result(path: Path) -> dict[str, Any]:
    """What a finished run's ``result.json`` says.

    Raises:
        ConfigError: it is missing or damaged, or a file is not what it was made of.
    """
    record = read_sealed(path / RESULT, older=True)
    if file := changed(path, record):
        raise ConfigError(
            f"{file}: is not what {RESULT} was made of; put it back, or let --resume end a run that went on"
        )
    record.pop(FILES_SHA256, None)
    return record


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """The records in a run directory's ``rounds.jsonl``; a half-written last line is left out.

    Raises:
        ConfigError: another line is no JSON object.
    """
    return read_lines(path / ROUNDS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file, one a line; a half-written last line is left out, none without the file.

    Raises:
        ConfigError: another line is no JSON object.
    """
    records = []
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate(lines[:-1], start=1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ConfigError(
                f"{file}: is damaged, line {number} is no JSON object; put it back, or begin anew elsewhere"
            )
        records.append(found)
    return records


def read_samples(path: Path) -> dict[str, Any]:
    """Generated texts of a run, by ``before`` and ``after``; empty where it writes none."""
    file = path / SAMPLES
    return read_sealed(file, older=True) if file.exists() else {}
