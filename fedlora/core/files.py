"""Writing so that a crash never leaves a half file or directory under a final name.

Every failure is an OSError that names the final path, whatever library met it (a full disk raises several).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from fedlora.errors import ConfigError

FILE_MODE = 0o644
"""mkstemp makes files for the owner alone; results are for reading."""
HASHED_BYTES = 2**26
"""Files that are no larger together are known by their content, others by what the system says of them."""
TRIAL_BYTES = 4096
"""Written and removed again to see that a disk takes anything at all: one block."""


def check_place(key: str, path: Path) -> None:
    """See that a directory can be written into, or can be made where it does not exist; nothing stays.

    Args:
        key: what the user set, for the message.
        path: the directory.

    Raises:
        ConfigError: a file or a broken link is in the way, or the system refuses, with its reason.
    """
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{key} {path}: is a link to {os.readlink(path)}, which is not there")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{key} {path}: is a file, name a directory")
    there = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=there, prefix=".fedlora-") as trial:
            trial.write(bytes(TRIAL_BYTES))
            trial.flush()
    except OSError as error:
        where = "" if there == path else f" in {there}"
        reason = error.strerror or error
        raise ConfigError(f"{key} {path}: cannot be written{where} ({reason})") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of writing name a path, in place of none or of a temporary neighbour."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from error
    except OSError as error:
        own = error.filename is None or f".{path.name}" in str(error.filename)
        if error.errno is None or not own:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def user_path(name: str | Path) -> Path:
    """A path as a person writes it: ``~`` is a home directory, whether a shell has seen it or not.

    Raises:
        ConfigError: ``~NAME`` of nobody.

    >>> user_path("a/~b").as_posix()
    'a/~b'
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ConfigError(f"{name}: there is no such home directory") from None


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file: into a temporary neighbour, flushed to disk, then renamed over ``path``.

    Raises:
        OSError: the system refuses; what was there before is still there.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data.encode() if isinstance(data, str) else data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, FILE_MODE)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, flushed to disk.

    Raises:
        OSError: the system refuses; a part of the line may stand there.
    """
    with naming(path), path.open("a") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary neighbour that becomes ``path`` when the block ends well, and vanishes otherwise.

    An existing ``path`` is replaced, so that at every moment the name holds a complete directory
    or none.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        try:
            temporary.chmod(0o755)
            yield temporary
            old = None
            if path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-old-"))
                os.replace(path, old / path.name)
            os.replace(temporary, path)
            if old is not None:
                shutil.rmtree(old)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def file_stamps(name: str) -> list[tuple[str | int, ...]]:
    """Path, size and hash of each local file that a name stands for.

    Where they are large together, times, inode and change of inode stand for the hash: copies that keep size
    and time (``cp -p``, ``rsync -a``, ``tar``) have others.
    """
    path = Path(name).expanduser()
    if not name or not path.exists():
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    stats = [(str(file.resolve()), file.stat()) for file in files]
    found = [(file, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for file, s in stats]
    if sum(stat.st_size for _, stat in stats) > HASHED_BYTES:
        return list(found)
    return [(file, size, _hash_of(file, size, *times)) for file, size, *times in found]


@lru_cache(maxsize=1024)
def _hash_of(file: str, *stamp: int) -> str:
    """Content of a file; read once in a process for as long as its stamp stays."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside, nobody else who asks writes results into a directory; the system frees it on any death.

    Raises:
        ConfigError: somebody else does, or nobody can.
    """
    check_place("--out", path)
    place = path.resolve()  # which has a name, where "." has none
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place.parent / f".{place.name}.lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"--out {path}: another fedlora writes there, let it end or choose another directory"
        ) from None
