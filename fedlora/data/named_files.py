"""Names of data that can only be those of files or directories, and what is said where none is there."""

from __future__ import annotations

import re
from pathlib import Path

from fedlora.config import DataConfig
from fedlora.data.columns import BUILT_IN, PICTURES
from fedlora.data.text_files import DELIMITERS, JSON, kind_of
from fedlora.errors import ConfigError

PARQUET = ".parquet"
FILE_KINDS = (*JSON, *DELIMITERS, PARQUET)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_files(config: DataConfig) -> None:
    """Refuse names of files that are not there; nothing is read.

    Raises:
        ConfigError: there is one.
    """
    named = [("data.name", config.name), ("data.public", config.public)]
    files = [(key, name) for key, name in named if name and names_file(name)]
    files += [("data.test", config.test)] if config.test else []
    files += [("data.evaluation-sets", file) for file in config.evaluation_files.values()]
    for key, file in files:
        path = Path(file).expanduser()
        if not path.exists():
            raise no_such_file(path, key)


def names_file(name: str) -> bool:
    """Whether a name is neither built in nor may be that of a dataset on the hub."""
    if name in (*BUILT_IN, *PICTURES):
        return False
    return kind_of(Path(name).expanduser()) in FILE_KINDS or not _HUB_ID.fullmatch(name)


def no_such_file(path: Path, key: str) -> ConfigError:
    """The error that a file is not there."""
    return ConfigError(
        f"{key} = {str(path)!r}: no such file (accepted are {', '.join(BUILT_IN)}, a "
        f"{'/'.join(FILE_KINDS)} file, a directory, a hub id)"
    )
