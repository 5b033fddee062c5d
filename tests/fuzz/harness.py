"""Spoils one file of a subject after another, and sorts what comes of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fedlora.core.seeding import stream
from fedlora.errors import FedLoraError
from tests.fuzz.spoil import spoiled
from tests.fuzz.subjects import Subject
from tests.wire.mutations import TOUCHED, picked

SILENT = "passed silently"
OLDER = ("result.json", "samples.json", "provenance.json", "fedlora.json")


class Fault(AssertionError):
    """A spoiled file that was run, raised what no user is told, or was taken for whole."""


def fuzz(name: str, subject: Subject, count: int, home: Path, seed: int = 0) -> Counter[str]:
    """How often a spoiled file was ``refused``, ``harmless``, or ``unsealed``.

    Args:
        name: of the subject; one of the streams.
        subject: what is spoiled.
        count: mutations.
        home: an empty directory.
        seed: of the mutations.

    Raises:
        Fault: with the seed and number by which it comes again.
    """
    rng, outcomes = stream(seed, "fuzz", name), Counter[str]()
    with as_quick_as_can_be():
        pristine, work = home / "pristine", home / "work"
        pristine.mkdir(parents=True)
        subject.make(pristine)
        whole = _copied(pristine, work, subject.read)
        for number in range(count):
            files = sorted(f for p in subject.names for f in pristine.glob(p) if f.is_file())
            chosen = picked(files, rng).relative_to(pristine)
            before = (pristine / chosen).read_bytes()
            after = spoiled(chosen.name, before, rng)

            def read(at: Path, chosen: Path = chosen, after: bytes = after) -> Any:
                (at / chosen).write_bytes(after)
                return outcome(subject, at, whole)

            found = _copied(pristine, work, read)
            if found == SILENT and unsealed(chosen.name, after):
                found = "unsealed"
            if found not in ("refused", "harmless", "unsealed") or TOUCHED:
                raise Fault(
                    f"{name}, seed {seed}, number {number}: {chosen}: {found} {TOUCHED}\n{after[:2000]!r}"
                )
            outcomes[found] += 1
    return outcomes


def outcome(subject: Subject, at: Path, whole: Any) -> str:
    """What came of reading spoiled files: ``refused``, ``harmless``, or what is wrong."""
    try:
        found = subject.read(at)
    except FedLoraError as error:
        told = str(error)
        named = str(at) in told or any(part.name in told for part in at.rglob("*"))
        return "refused" if told and "\n" not in told and named else f"refused without a file's name: {told}"
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    try:
        expected = whole if subject.by_hand is None else subject.by_hand(at)
    except Exception as error:
        return f"was read, and a plain reading of it raises {type(error).__name__}: {error}"
    return "harmless" if _same(found, expected) else SILENT


def unsealed(name: str, content: bytes) -> bool:
    """Whether a record looks like one of before there were seals, which is read as it stands.

    No flipped bit and no cut makes one of another: it takes somebody who drops an entry and changes another.
    """
    found = json.loads(content) if name in OLDER else None
    return isinstance(found, dict) and "sha256" not in found


def _same(a: Any, b: Any) -> bool:
    """Equality in which NaN is NaN."""
    return bool(a == b) or repr(a) == repr(b)


def _copied(pristine: Path, work: Path, do: Callable[[Path], Any]) -> Any:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work)
    return do(work)


@contextmanager
def as_quick_as_can_be() -> Iterator[None]:
    """No waiting for a disk, no git, no warnings of what was mended: none of it decides what is read."""
    with (
        patch("os.fsync", lambda handle: None),
        patch("fedlora.server.directory.log", lambda *words: None),
        patch("fedlora.server.checkpoint.log", lambda *words: None),
        patch("logging.Logger.warning", lambda *words, **more: None),
    ):
        yield
