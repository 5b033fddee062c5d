"""Several adapters of one base: what they have in common, and whatever speaks against averaging them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError
from fedlora.factors import LoraFactors
from fedlora.models.export import AdapterCard
from fedlora.models.peft_files import PeftAdapter
from fedlora.models.plain_lora import IDENTITY
from fedlora.updates import ModuleSpec

NAMES = ("base_model_name_or_path", "revision")
"""How a base is called: one model may have several names, which only its user can know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterGroup:
    """Adapters that fit together.

    Attributes:
        members: the adapters, in the order of the request.
        modules: every layer that one of them adapts, sorted by name.
        identity: the base, in PEFT's fields.
        card: the base, where fedlora wrote the adapters.
    """

    members: Sequence[PeftAdapter]
    modules: Mapping[str, ModuleSpec]
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
        """What the adapters train whole; names that their model does not have are left out."""
        return sorted({m.config.saver(name) or name for m in self.members for name in m.head})

    @property
    def fan_in_fan_out(self) -> bool:
        """PEFT's flag for Conv1D; it warns and corrects it where it is wrong."""
        return any(m.config.fan_in_fan_out for m in self.members)


def gather(members: Sequence[PeftAdapter], base: Path | None) -> AdapterGroup:
    """The adapters as a group.

    Args:
        members: at least one.
        base: the model that all belong to, where the user names it: then they may name it as they like.

    Raises:
        ConfigError: different bases, layers of different sizes, a module that an adapter should have, or
            heads that do not match.
    """
    identity = _common_identity(members, base)
    shapes = _common_shapes(members)
    check_complete(members, shapes)
    _check_heads(members)
    return AdapterGroup(members=members, modules=shapes, identity=identity, card=members[0].card)


def check_complete(members: Sequence[PeftAdapter], layers: Collection[str]) -> None:
    """Refuse an adapter that says it adapts one of these layers, but holds no factors of it."""
    for member in members:
        for name in layers:
            if name not in member.adapters and member.config.targets(name):
                raise ConfigError(
                    f"{member.path}: its configuration targets {name}, but it holds no factors of that module"
                )


def _common_identity(members: Sequence[PeftAdapter], base: Path | None) -> Mapping[str, Any]:
    first = members[0]
    identity = dict(first.config.identity)
    for other in members[1:]:
        for key in IDENTITY:
            mine, others = first.config.identity[key], other.config.identity[key]
            if mine == others:
                continue
            if key not in NAMES:
                raise ConfigError(_differ(first, other, key, mine, others))
            if base is None:
                hint = " (if that is one model, name it with --base)"
                raise ConfigError(_differ(first, other, key, mine, others) + hint)
            identity |= {"base_model_name_or_path": str(base), "revision": None}
        if first.card != other.card:
            raise ConfigError(_cards_differ(first, other))
    return identity


def _differ(first: PeftAdapter, other: PeftAdapter, key: str, mine: object, others: object) -> str:
    return f"adapters of different base models: {key} is {mine!r} in {first.path}, {others!r} in {other.path}"


def _cards_differ(first: PeftAdapter, other: PeftAdapter) -> str:
    if first.card is None or other.card is None:
        return _differ(first, other, "fedlora.json", first.card and "there", other.card and "there")
    mine, others = dataclasses.asdict(first.card), dataclasses.asdict(other.card)
    key = next(key for key in mine if mine[key] != others[key])
    return _differ(first, other, f"{key} in fedlora.json", mine[key], others[key])


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
