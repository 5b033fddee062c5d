"""Spoils one file of a subject after another, and sorts what comes of it."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fedlora.core.sealed import _say_unsealed
from fedlora.core.seeding import stream
from fedlora.errors import FedLoraError
from tests.fuzz.spoil import spoiled
from tests.fuzz.subjects import Subject
from tests.wire.mutations import TOUCHED, picked

SILENT = "passed silently"
LOST = 0.02
"""Share of the mutations that take a file away."""


class Fault(AssertionError):
    """A spoiled file that was run, raised what no user is told, or was taken for whole."""


def fuzz(name: str, subject: Subject, count: int, home: Path, seed: int = 0) -> Counter[str]:
    """How often a spoiled file was ``refused``, ``harmless``, or ``said``.

    The last is a record that lost its seal as a whole, and was read with a word that nothing vouches for it.

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
    with as_quick_as_can_be() as told:
        pristine, work = home / "pristine", home / "work"
        pristine.mkdir(parents=True)
        subject.make(pristine)
        whole = _copied(pristine, work, subject.read)
        for number in range(count):
            files = sorted(f for p in subject.names for f in pristine.glob(p) if f.is_file())
            chosen = picked(files, rng).relative_to(pristine)
            lost = rng.random() < LOST and not any(chosen.match(p) for p in subject.may_be_lost)
            after = None if lost else spoiled(chosen.name, (pristine / chosen).read_bytes(), rng)

            def read(at: Path, chosen: Path = chosen, after: bytes | None = after) -> Any:
                if after is None:
                    (at / chosen).unlink()
                else:
                    (at / chosen).write_bytes(after)
                return outcome(subject, at, whole)

            told.clear()
            found = _copied(pristine, work, read)
            if found == SILENT and any(f"{chosen.name}: has no sha256" in line for line in told):
                found = "said"
            if found not in ("refused", "harmless", "said") or TOUCHED:
                shown = "lost" if after is None else repr(after[:2000])
                raise Fault(f"{name}, seed {seed}, number {number}: {chosen}: {found} {TOUCHED}\n{shown}")
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


def _same(a: Any, b: Any) -> bool:
    """Equality in which NaN is NaN."""
    return bool(a == b) or repr(a) == repr(b)


def _copied(pristine: Path, work: Path, do: Callable[[Path], Any]) -> Any:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work)
    return do(work)


@contextmanager
def as_quick_as_can_be() -> Iterator[list[str]]:
    """No waiting for a disk, no git; warnings come into a list. None of it decides what is read."""
    told: list[str] = []
    with (
        patch("os.fsync", lambda handle: None),
        patch("fedlora.server.directory.log", lambda *words: None),
        patch("fedlora.server.checkpoint.log", lambda *words: None),
        patch("logging.Logger.warning", lambda _, text, *words, **more: told.append(text % words)),
        patch("fedlora.core.sealed._say_unsealed", _say_unsealed.__wrapped__),  # again and again
    ):
        yield told
