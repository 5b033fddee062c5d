"""Several adapters of one base: what they have in common, and whatever speaks against averaging them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.core.factors import LoraFactors, Tensors
from fedlora.core.state import ModuleSpec
from fedlora.errors import ConfigError
from fedlora.models.card import AdapterCard
from fedlora.models.peft_files import PeftAdapter
from fedlora.models.same_base import common_identity


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterGroup:
    """Adapters that fit together.

    Attributes:
        members: the adapters, in the order of the request.
        modules: every layer that one of them adapts, sorted by name.
        embeddings: those of the modules that are embeddings.
        frozen: weights of the base that PEFT saved with the adapters, the same in all of them.
        identity: the base, in PEFT's fields.
        card: the base, where fedlora wrote the adapters.
    """

    members: Sequence[PeftAdapter]
    modules: Mapping[str, ModuleSpec]
    embeddings: frozenset[str]
    frozen: Tensors
    identity: Mapping[str, Any]
    card: AdapterCard | None

    def holders(self, module: str) -> list[tuple[PeftAdapter, LoraFactors]]:
        """The adapters that have a module, with their factors."""
        return [(m, m.adapters[module]) for m in self.members if module in m.adapters]

    @property
    def partial(self) -> dict[str, int]:
        """The adapters that lack modules which others have, by name, with the number they lack."""
        lacking = {str(m.path): len(self.modules) - len(m.adapters) for m in self.members}
        return {name: count for name, count in lacking.items() if count}

    @property
    def modules_to_save(self) -> list[str]:
        """Modules that the adapters train whole; names that their model does not have are left out."""
        return sorted({m.config.saver(name) or name for m in self.members for name in m.head})

    @property
    def fan_in_fan_out(self) -> bool:
        """PEFT's flag for Conv1D; it warns and corrects it where it is wrong."""
        return any(m.config.fan_in_fan_out for m in self.members)

    @property
    def wrapped(self) -> dict[str, tuple[str, ...]]:
        """The adapters of wrapped models, by name, with the wrappers."""
        return {str(m.path): m.wrappers for m in self.members if m.wrappers}


def gather(members: Sequence[PeftAdapter], base: Path | None) -> AdapterGroup:
    """The adapters as a group.

    Args:
        members: at least one.
        base: the model that all belong to, where the user names it: then they may name it as they like.

    Raises:
        ConfigError: different bases, layers of different sizes, a module that an adapter should have, or
            heads that do not match.
    """
    identity = common_identity(members, base)
    shapes = _common_shapes(members)
    check_complete(members, shapes)
    _check_heads(members)
    return AdapterGroup(
        members=members,
        modules=shapes,
        embeddings=_common_embeddings(members),
        frozen=_common_frozen(members),
        identity=identity,
        card=members[0].card,
    )


def check_complete(members: Sequence[PeftAdapter], layers: Collection[str]) -> None:
    """Refuse an adapter that says it adapts one of these layers, but holds no factors of it."""
    for member in members:
        for name in layers:
            if name not in member.adapters and member.config.targets(name):
                raise ConfigError(
                    f"{member.path}: its configuration targets {name}, but it holds no factors of that module"
                )


def check_saved(members: Sequence[PeftAdapter], modules: Collection[str]) -> None:
    """Refuse an adapter that says it trains one of these modules whole, but holds no tensor of it."""
    for member in members:
        for name in modules:
            if name.endswith(member.config.modules_to_save) and not any(
                tensor.startswith(f"{name}.") for tensor in member.head
            ):
                raise ConfigError(
                    f"{member.path}: its modules_to_save names {name}, but it holds no tensor of that module"
                )


def _common_shapes(members: Sequence[PeftAdapter]) -> dict[str, ModuleSpec]:
    shapes: dict[str, tuple[ModuleSpec, PeftAdapter]] = {}
    for member in members:
        for name, f in member.adapters.items():
            spec = ModuleSpec(out_features=f.out_features, in_features=f.in_features)
            known, owner = shapes.setdefault(name, (spec, member))
            if spec != known:
                raise ConfigError(
                    f"adapters of different base models: {name} is {_size(known)} in {owner.path}, "
                    f"{_size(spec)} in {member.path}"
                )
    return {name: shapes[name][0] for name in sorted(shapes)}


def _common_embeddings(members: Sequence[PeftAdapter]) -> frozenset[str]:
    found = frozenset[str]().union(*(m.embeddings for m in members))
    for member in members:
        for name in sorted(found & (member.adapters.keys() - member.embeddings)):
            owner = next(m for m in members if name in m.embeddings)
            raise ConfigError(
                f"adapters of different base models: {name} is an embedding in {owner.path}, "
                f"a linear layer in {member.path}"
            )
    return found


def _common_frozen(members: Sequence[PeftAdapter]) -> Tensors:
    """The weights of the base that came with adapters.

    That of an adapted layer may be missing in some, any other must be in all.
    """
    found: Tensors = {}
    for name in sorted({name for m in members for name in m.frozen}):
        holders = [m for m in members if name in m.frozen]
        for member in members:
            if name not in member.frozen and ".base_layer." not in name:
                raise ConfigError(
                    f"{holders[0].path}: {name} is neither a LoRA factor nor part of modules_to_save, and "
                    f"{member.path} lacks it (embeddings that PEFT added: save with "
                    "save_embedding_layers=False)"
                )
        for other in holders[1:]:
            if not _equal(holders[0].frozen[name], other.frozen[name]):
                raise ConfigError(
                    f"{name}, saved beside the adapters but not adapted, differs between {holders[0].path} "
                    f"and {other.path}: it can only be passed on where it is the same"
                )
        found[name] = holders[0].frozen[name]
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def _check_heads(members: Sequence[PeftAdapter]) -> None:
    first = members[0]
    for other in members[1:]:
        for name in sorted({*first.head, *other.head}):
            here, there = (_shape(member, name) for member in (first, other))
            if here != there:
                raise ConfigError(
                    f"{name} (modules_to_save) is {here} in {first.path}, {there} in {other.path}: a head "
                    "can be averaged where all adapters have it in one shape"
                )


def _shape(member: PeftAdapter, name: str) -> str:
    return str(tuple(member.head[name].shape)) if name in member.head else "missing"


def _size(spec: ModuleSpec) -> str:
    return f"{spec.out_features} x {spec.in_features}"
