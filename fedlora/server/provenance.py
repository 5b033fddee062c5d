"""Provenance of a run, and whether this version of fedlora can read it."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.core.code import version_of
from fedlora.core.sealed import read_sealed
from fedlora.errors import ConfigError
from fedlora.server.identity import LIBRARIES, Identity, identity

PROVENANCE = "provenance.json"
SCHEMA = 1
"""Counted up whenever files of a run or a study come to mean something else; 1 where none is written."""
PACKAGES = ("fedlora", *LIBRARIES, "ray")


def check_schema(file: Path) -> None:
    """Refuse what another version of fedlora wrote with other meanings; a file that is not there is fine.

    Raises:
        ConfigError: the file is of another schema, or cannot be read.
    """
    if not file.exists():
        return
    schema = read_sealed(file, older=True).get("schema", 1)
    if schema != SCHEMA:
        raise ConfigError(
            f"{file}: is of schema {schema}, this version of fedlora reads and writes {SCHEMA}; use another "
            "--out"
        )


def provenance(
    config: RunConfig, inputs: str | None = None, before: Identity | None = None
) -> dict[str, Any]:
    """Versions, commit, hardware, seed and identity of a run; for the arguments see `identity`."""
    return {
        "schema": SCHEMA,
        "seed": config.seed,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "identity": asdict(identity(config, inputs, before)),
    }


def read_provenance(file: Path) -> dict[str, Any]:
    """Contents of a ``provenance.json``; empty where there is none, or nothing that can be read."""
    try:
        return read_sealed(file, older=True)
    except ConfigError:
        return {}


@cache
def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with ``+changes`` if it has any.

    Of the process's first run: what was imported stays as it was then.
    """
    here = Path(__file__).parents[1]
    try:
        head, changes = (
            subprocess.run(
                ["git", *command], cwd=here, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes else "")
