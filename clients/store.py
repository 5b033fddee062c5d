"""Store of a client's machine between messages: shared parts by digest, and personal tensors.

One directory for a run (``<state-dir>/<run-key>``), safetensors files written atomically:

* ``parts/<digest>.safetensors``: base patches and frozen factors. The name is the content's hash, so
  processes on one machine share them, writing twice is harmless, and a damaged file is noticed;
* ``personal/<partition>/<name>-<round>.safetensors``: a client's own tensors (a local head), by the
  round that made them, so that a round that is run again starts from the same ones, and with their digest,
  so that nobody goes on from a damaged file;
* ``named/<round>-<list>.json``: the parts that a round's instructions named. Parts that the last rounds did
  not name go: neither a factor that is frozen anew in each round nor a base patch that is in a sum by now
  leaves a trail.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedlora import wire
from fedlora.core.adapters import Adapters, tensor_names
from fedlora.core.base_patches import Patch, digest, summed
from fedlora.core.factors import Tensors
from fedlora.core.files import write_atomic
from fedlora.core.sealed import is_digest
from fedlora.errors import FactorShapeError, UpdateRefused


@dataclass(frozen=True, slots=True)
class ResolvedInstruction:
    """Instruction whose parts are all here.

    Attributes:
        adapters: the complete starting adapter, all tensors of every module.
        head: the other tensors that travelled.
        store: the store; the base patches are in it under ``instruction.needs.base``.
    """

    adapters: Adapters
    head: Tensors
    store: ClientStore

    def with_own(self, own: Tensors) -> ResolvedInstruction:
        """The same with tensors that the client kept to itself, in PEFT's spelling, in their place."""
        mine = wire.from_peft(own, tensor_names(self.adapters))
        return ResolvedInstruction(mine.over(self.adapters), {**self.head, **mine.head}, self.store)

    def patch(self, name: str) -> Patch:
        """The base patch of a digest.

        Raises:
            UpdateRefused: it is no longer in the store.
        """
        tensors = self.store.get(name)
        if tensors is None:
            raise UpdateRefused(f"base patch {name[:12]} vanished from the store")
        return Patch.from_tensors(tensors)


def run_key(instruction: wire.TrainInstruction) -> str:
    """Name of the run at its clients."""
    return str(instruction.config.get("run-key", "run"))


def resolve(instruction: wire.TrainInstruction, store: ClientStore) -> ResolvedInstruction | wire.Reply:
    """The resolved instruction, or the reply that lists what this client lacks.

    Raises:
        UpdateRefused: a part does not have the content that its digest promises.
    """
    named = {
        instruction.needs.frozen: wire.frozen_part(instruction),
        instruction.needs.moving: wire.moving_part(instruction),
    }
    travelled = wire.layers_travelled(instruction) if instruction.needs.layers else {}
    named |= {name: travelled.get(name, {}) for name in instruction.needs.layers}
    named.pop("", None)
    try:
        for name, tensors in {**instruction.parts, **named}.items():
            if tensors:  # else it is expected to be here
                store.keep(name, tensors)
    except ValueError as error:
        raise UpdateRefused(str(error)) from None
    _add_up(instruction.needs, store)
    missing = tuple(name for name in instruction.needs.digests if not store.has(name))
    if missing:
        return wire.Reply(status=wire.MISSING, missing=missing)
    store.note_named(instruction.server_round, (*named, *instruction.needs.base, *instruction.needs.sum_of))
    held = Tensors()
    for name in named:
        held |= store.get(name) or {}
    adapters, head = wire.complete_adapters(instruction, held)
    return ResolvedInstruction(adapters, head, store)


def _add_up(needs: wire.Needs, store: ClientStore) -> None:
    """Keep the base's first patch, where it is the sum of others that are here.

    Another machine's arithmetic may come to other bits than the server's: then it is missing, and is sent.
    """
    if not needs.sum_of or not needs.base or store.has(needs.base[0]):
        return
    terms = [store.get(name) for name in needs.sum_of]
    if None in terms:
        return
    try:
        found = summed([Patch.from_tensors(term) for term in terms if term is not None])
    except FactorShapeError as error:
        raise UpdateRefused(f"what the base is the sum of: {error}") from None
    if found.digest() == needs.base[0]:
        store.keep(needs.base[0], found.tensors())


OWN = "own"
"""What a client keeps to itself: a local head, factors that it trains and does not ship."""
OWED = "owed"
"""What an upload codec with error feedback has left out so far, see `fedlora.wire.upload`."""
KEEP_NAMED = 8
"""Rounds after which a part that no instruction names any more is dropped; who needs it again is sent it."""


class ClientStore:
    """Store of a client's machine for one run; parts are also kept in memory once read.

    Args:
        directory: of the run.
        whole: files that this process has found whole, each with its time and size then; added to.
        versions: of what clients keep to themselves; one more than the server has checkpoints of rounds, so
            that a run that goes on from the oldest of them finds what its clients had then.
    """

    def __init__(
        self, directory: Path, whole: dict[Path, tuple[int, int]] | None = None, versions: int = 2
    ) -> None:
        self.directory = directory
        self._versions = versions
        self._whole = {} if whole is None else whole
        self._parts: dict[str, Tensors] = {}

    def keep(self, name: str, tensors: Tensors) -> None:
        """Store a part under its digest.

        Raises:
            ValueError: the content does not have that digest.
        """
        if name in self._parts:
            return
        if digest(tensors) != name:
            raise ValueError(f"part {name[:12]} does not have the content that its name promises")
        path = self._part(name)
        if not path.exists():
            write_atomic(path, save({k: t.contiguous() for k, t in tensors.items()}))
        self._parts[name] = tensors

    def has(self, name: str) -> bool:
        """Whether `get` gives the part of that digest.

        A file that this process has read before and that nobody has touched since is not read again: a base
        that moves in every round has as many parts as rounds.
        """
        if name in self._parts:
            return True
        path = self._part(name)
        stamp = _stamp(path)
        return stamp is not None and (self._whole.get(path) == stamp or self._read(path, name) is not None)

    def get(self, name: str) -> Tensors | None:
        """The part of that digest, or None if it is not here or damaged."""
        if name not in self._parts:
            tensors = self._read(self._part(name), name)
            if tensors is None:
                return None
            self._parts[name] = tensors
        return self._parts[name]

    def note_named(self, server_round: int, names: Iterable[str]) -> None:
        """Note the parts that a round needs, and drop those that only rounds long past needed."""
        listed = json.dumps(sorted(names))
        folder, short = self.directory / "named", hashlib.sha256(listed.encode()).hexdigest()[:16]
        file = folder / f"{server_round:06d}-{short}.json"
        if listed == "[]" or file.exists():
            return
        write_atomic(file, listed)
        lists = {path: _listed(path) for path in sorted(folder.glob("*.json"))}
        past = {path for path in lists if int(path.name[:6]) <= server_round - KEEP_NAMED}
        needed = {name for path, names in lists.items() if path not in past for name in names}
        for path in sorted(past):
            for name in lists[path] - needed:
                self._part(name).unlink(missing_ok=True)
                self._whole.pop(self._part(name), None)
            path.unlink(missing_ok=True)

    def keep_personal(self, partition_id: int, name: str, server_round: int, tensors: Tensors) -> None:
        """Store a client's own tensors as they are after a round.

        The oldest versions go, and those of later rounds, which a run that went back has not been through.
        """
        folder = self._personal(partition_id)
        for undone in folder.glob(f"{name}-*.safetensors"):
            if _round_of(undone) > server_round:
                undone.unlink(missing_ok=True)
        write_atomic(
            folder / f"{name}-{server_round:06d}.safetensors", save(tensors, {DIGEST: digest(tensors)})
        )
        for old in sorted(folder.glob(f"{name}-*.safetensors"))[: -self._versions]:
            old.unlink(missing_ok=True)

    def personal(self, partition_id: int, name: str, before_round: int) -> Tensors | None:
        """A client's own tensors as the last round before ``before_round`` left them.

        Raises:
            UpdateRefused: their file is damaged.
        """
        for path in sorted(self._personal(partition_id).glob(f"{name}-*.safetensors"), reverse=True):
            if _round_of(path) < before_round:
                return _undamaged(path)
        return None

    def _read(self, path: Path, name: str) -> Tensors | None:
        """The part in a file, or None if it has not that digest."""
        stamp, tensors = _stamp(path), _tensors(path)
        if stamp is None or tensors is None or digest(tensors) != name:
            return None
        self._whole[path] = stamp
        return tensors

    def _part(self, name: str) -> Path:
        return self.directory / "parts" / f"{name}.safetensors"

    def _personal(self, partition_id: int) -> Path:
        return self.directory / "personal" / str(partition_id)


def _round_of(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def _tensors(path: Path) -> Tensors | None:
    try:
        return dict(load(path.read_bytes()))
    except (FileNotFoundError, SafetensorError):
        return None


DIGEST = "digest"
"""Entry of a file's metadata."""


def _undamaged(path: Path) -> Tensors:
    """The tensors in a file that has their digest in it.

    Raises:
        UpdateRefused: it has none, or that of others.
    """
    try:
        content = path.read_bytes()
        tensors = dict(load(content))
        length = int.from_bytes(content[:8], "little")
        told = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
        whole = told.get(DIGEST) == digest(tensors)
    except (SafetensorError, ValueError):
        whole = False
    if not whole:
        raise UpdateRefused(
            f"{path.parent.name}/{path.name}: what this client keeps to itself is damaged; put it back, or "
            "delete it to begin anew"
        )
    return tensors


def _listed(path: Path) -> set[str]:
    """The digests in a list; none where another process has just dropped it, or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return set()
    return {name for name in found if is_digest(name)} if isinstance(found, list) else set()
