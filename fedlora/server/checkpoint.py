"""A run between two rounds, on disk: everything needed to go on with the same bits.

``state-00007.safetensors`` has adapters, head, the rule's memory and what client-level privacy goes on from,
after round 7, and those before the last ``save-total-limit`` are dropped; ``patch-<digest>.safetensors`` are
the base's patches, each written once and dropped when no state has it any more; ``latest.json`` says which of
them count, and all that is no tensor. Where earlier rounds are kept ``round-00006.json`` is what it was after
round 6, and in its place goes on from there. It is sealed (`fedlora.core.sealed`), and holds the digests of
the tensors in the other files, so that nothing that changed on disk is gone on with: a patch that did is
taken from what simulated clients keep of it, all else is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedlora.core.adapters import LayerAdapter, NamedTensors
from fedlora.core.base_patches import Patch, digest
from fedlora.core.factors import LoraFactors, Tensors
from fedlora.core.files import write_atomic
from fedlora.core.sealed import read_sealed, reason_of, sealed
from fedlora.core.state import InFlight, ServerState, State
from fedlora.errors import ConfigError


def write_checkpoint(
    folder: Path, checkpoint: ServerState, beside: Mapping[str, Any] | None = None, keep: int = 1
) -> None:
    """Write the state, then point ``latest.json`` at it, then drop the states before the last ``keep``.

    Args:
        folder: of the checkpoint.
        checkpoint: the run between two rounds.
        beside: what ``latest.json`` is to vouch for of the run's other files.
        keep: states that are kept.

    A patch that a state on disk counts is not written again; one beyond them is left of a crash.
    """
    state = checkpoint.state
    latest = folder / "latest.json"
    settled = set(_patch_digests(folder))
    for patch in state.base:
        if patch.digest() not in settled:
            write_atomic(_patch_file(folder, patch.digest()), save(_contiguous(patch.tensors())))
    name = f"state-{state.round:05d}.safetensors"
    flying = {f"flight.{f.number}.{name}": t for f in checkpoint.in_flight for name, t in f.tensors.items()}
    tensors = _contiguous(_state_tensors(state) | flying | _named("private", checkpoint.private))
    write_atomic(folder / name, save(tensors))
    about = {
        "state": name,
        "round": state.round,
        "seed": state.seed,
        "scaling": {module: adapter.scaling for module, adapter in state.adapters.items()},
        **_parts(state),
        "participations": checkpoint.participations,
        "acknowledged": {p: sorted(held) for p, held in checkpoint.acknowledged.items()},
        "ledger-heads": checkpoint.ledger_heads,
        **({"in-flight": [_flight(f) for f in checkpoint.in_flight]} if checkpoint.in_flight else {}),
        **({"last-asked": checkpoint.asked} if checkpoint.asked else {}),
        "digest": digest(tensors),
        "patch-digests": [patch.digest() for patch in state.base],
        **({"patch-sums": sums} if (sums := {p.digest(): p.sum_of for p in state.base if p.sum_of}) else {}),
        "beside": dict(beside or {}),
    }
    text = json.dumps(sealed(about)) + "\n"
    if keep > 1:
        write_atomic(folder / f"round-{state.round:05d}.json", text)
    write_atomic(latest, text)
    _prune(folder, state.round, keep)


def _prune(folder: Path, last: int, keep: int) -> None:
    """Drop the states, and what stands beside them, of other rounds than the ``keep`` up to the last one."""
    for old in (*folder.glob("state-*.safetensors"), *folder.glob("round-*.json")):
        if not last - keep < int(old.stem.rpartition("-")[2]) <= last:
            old.unlink(missing_ok=True)
    counted = {_patch_file(folder, name) for name in _patch_digests(folder)}
    for patch in set(folder.glob("patch-*.safetensors")) - counted:
        patch.unlink(missing_ok=True)


def _patch_digests(folder: Path) -> list[str]:
    """Digests of the patches that a state in a folder counts."""
    records = [file for file in (folder / "latest.json", *folder.glob("round-*.json")) if file.exists()]
    return [name for file in records for name in read_sealed(file).get("patch-digests", [])]


def _patch_file(folder: Path, name: str) -> Path:
    return folder / f"patch-{name[:16]}.safetensors"


FIRST_STATE = "state-00001.safetensors"
"""What may stand there before the first ``latest.json``, where the process ended in between."""


def read_checkpoint(folder: Path, spare: Path | None = None) -> ServerState | None:
    """The last checkpoint, or None if no round was finished.

    Args:
        folder: of the checkpoint.
        spare: a directory of parts by their digests, out of which a damaged patch is written anew.

    Raises:
        ConfigError: a file is missing, damaged, or not the one that the round left.
    """
    if not (folder / "latest.json").exists():
        if {file.name for file in folder.glob("state-*.safetensors")} - {FIRST_STATE}:
            raise ConfigError(f"{folder / 'latest.json'}: is missing, which says what the others are")
        return None
    about = read_sealed(folder / "latest.json")
    if about.get("patches"):
        raise ConfigError(
            f"{folder / 'latest.json'}: an earlier version of fedlora wrote it, which named base patches "
            "otherwise; finish the run with that version, or begin anew elsewhere"
        )
    tensors = read_tensors(folder / about["state"], about["digest"])
    sums = about.get("patch-sums", {})
    patches = [
        _patch(_patch_file(folder, name), name, spare, tuple(sums.get(name, ())))
        for name in about.get("patch-digests", [])
    ]
    parts = about.get("parts", {})
    adapters: dict[str, LayerAdapter] = {}
    for module, scaling in about["scaling"].items():
        own, roles = _under(f"adapter.{module}.", tensors), parts.get(module)
        if roles is None:
            adapters[module] = LoraFactors(scaling=scaling, **own)
        else:
            named = {role: tuple(names) for role, names in roles.items()}
            adapters[module] = NamedTensors(own, about["rank"], scaling, named)
    state = State(
        round=about["round"],
        adapters=adapters,
        head=_under("head.", tensors),
        base=tuple(patches),
        memory=_under("memory.", tensors),
        seed=about["seed"],
    )
    return ServerState(
        state,
        {int(p): n for p, n in about["participations"].items()},
        {int(p): set(held) for p, held in about["acknowledged"].items()},
        {int(p): head for p, head in about.get("ledger-heads", {}).items()},
        tuple(
            InFlight(**flight, tensors=_under(f"flight.{flight['number']}.", tensors))
            for flight in about.get("in-flight", [])
        ),
        {int(p): number for p, number in about.get("last-asked", {}).items()},
        _under("private.", tensors),
    )


def _flight(flight: InFlight) -> dict[str, Any]:
    """All of a flight that is no tensor."""
    return {f.name: getattr(flight, f.name) for f in fields(flight) if f.name != "tensors"}


def read_beside(folder: Path) -> dict[str, Any]:
    """What ``latest.json`` vouches for of the run's other files; empty where there is none.

    Raises:
        ConfigError: it is damaged.
    """
    latest = folder / "latest.json"
    return dict(read_sealed(latest).get("beside", {})) if latest.exists() else {}


def _patch(file: Path, expected: str, spare: Path | None, sum_of: tuple[str, ...]) -> Patch:
    """A base patch; one that is damaged comes from ``spare`` if it is there, which is said."""
    try:
        return Patch.from_tensors(read_tensors(file, expected), sum_of)
    except ConfigError as error:
        other = None if spare is None else spare / f"{expected}.safetensors"
        if other is None or not other.exists():
            raise
        tensors = read_tensors(other, expected)
        write_atomic(file, save(_contiguous(tensors)))
        log(WARNING, "%s; it was written anew from what the clients keep", error)
        return Patch.from_tensors(tensors, sum_of)


def _state_tensors(state: State) -> Tensors:
    tensors = {f"adapter.{m}.{side}": t for m, f in state.adapters.items() for side, t in f.tensors().items()}
    return tensors | _named("head", state.head) | _named("memory", state.memory)


def _parts(state: State) -> dict[str, Any]:
    """Fields of adapters other than LoRA's that are no tensors; nothing for LoRA."""
    named = {m: a for m, a in state.adapters.items() if isinstance(a, NamedTensors)}
    if not named:
        return {}
    return {"parts": {m: a.parts for m, a in named.items()}, "rank": next(iter(named.values())).rank}


def _contiguous(tensors: Tensors) -> Tensors:
    """Copies that safetensors can write: contiguous, and none sharing memory."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}


def _named(kind: str, tensors: Tensors) -> Tensors:
    return {f"{kind}.{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def read_tensors(file: Path, expected: str) -> Tensors:
    """The tensors in a safetensors file.

    Args:
        file: to read.
        expected: their digest.

    Raises:
        ConfigError: the file is not there, cannot be read, or holds others.
    """
    try:
        tensors = dict(load(file.read_bytes()))
    except OSError as error:
        raise ConfigError(f"{file}: {reason_of(error)}") from None
    except (SafetensorError, ValueError, KeyError):
        raise ConfigError(f"{file}: is damaged, it cannot be read as tensors") from None
    if digest(tensors) != expected:
        raise ConfigError(f"{file}: is damaged, its tensors are not those that were written")
    return tensors
