"""The runs of a study: strategies, references and variants, each under every setting, with every seed.

A reference answers what federation costs or brings, at the budget of the study. ``centralised`` is
FedAvg with one client that holds everybody's data: as many sequential steps as a client makes, as many
examples as all sampled clients see. ``local-only`` is what each client reaches alone, training in every
round, measured on its own domains. References are measured after the last round only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedlora.config import (
    FlatConfig,
    RunConfig,
    StudyConfig,
    flatten,
    from_flat,
    name_list,
    to_flat,
)
from fedlora.errors import ConfigError
from strategies.registry import make_rule

Kind = Literal["strategy", "reference", "variant"]

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ALONE: FlatConfig = {
    "fraction-train": 1.0,
    "min-train-nodes": 1,
    "min-available-nodes": 1,
    "client-groups": "",
    "lora.ranks": "",
    "lora.personal-rank": 0,
    "lora.personal-weights": "one",
}
"""What every run with a single client needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a study.

    Attributes:
        label: names the run, and its directory; unique in the study whatever the case of its letters.
        kind: where it comes from.
        seed: its seed, which is also the configuration's.
        config: the run's configuration, without the ``study`` section.
        group: what it is a repetition of: the label without the seed.
        method: the strategy, reference or variant: the group without the setting.
        setting: which of ``study.settings``; empty where there are none.
    """

    label: str
    kind: Kind
    seed: int
    config: RunConfig
    group: str
    method: str
    setting: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """A cell before it has a seed; ``where`` leads its error messages."""

    method: str
    kind: Kind
    flat: FlatConfig
    where: str
    setting: str = ""

    @property
    def group(self) -> str:
        return f"{self.method}-{self.setting}" if self.setting else self.method


def expand(config: RunConfig, num_partitions: int) -> list[Cell]:
    """The runs of ``config.study``, all of one seed before the next.

    With one seed a label is the name of the strategy, reference or variant, followed by ``-SETTING`` where
    there are settings; with several seeds it ends in ``-seed-N``. A setting's keys lie on top of the file;
    on top of them the overrides of the strategy, or a variant's own keys; on top of all the overrides
    that are named after the whole group. References start from the overrides of ``fedavg``.

    Args:
        config: the study's file.
        num_partitions: how many partitions the data of that file has.

    Raises:
        ConfigError: nothing to compare, an unknown strategy or key, an override of a strategy that is
            not listed, a name that is taken or cannot name a directory, or a reference that would not
            have the study's budget.
    """
    study = config.study
    overrides, variants, settings = (_objects(study, n) for n in ("overrides", "variants", "settings"))
    entries = [
        _placed(entry, name, overrides)
        for name, keys in (settings or {"": {}}).items()
        for entry in _under(config, name, keys, overrides, variants, num_partitions)
    ]
    _check_names(study, overrides, {entry.group for entry in entries})
    if not entries:
        raise ConfigError("study.strategies = '': name at least one strategy, reference or variant")
    seeds = study.seed_list or (config.seed,)
    cells = [_cell(entry, seed, several=len(seeds) > 1) for seed in seeds for entry in entries]
    _refuse_repetition("study", [cell.label for cell in cells])
    return cells


# --- the three kinds ---------------------------------------------------------------------------------


def _under(
    config: RunConfig,
    setting: str,
    keys: FlatConfig,
    overrides: Mapping[str, FlatConfig],
    variants: Mapping[str, FlatConfig],
    num_partitions: int,
) -> list[_Entry]:
    """All entries of one setting."""
    if config.study.references and any(key.startswith("data.") for key in keys):
        raise ConfigError(
            f"study.settings {setting}: changes the data, where study.references cannot follow; "
            "make it a study of its own"
        )
    base = _checked({**to_flat(config), **keys}, f"study.settings {setting}: ")
    return [
        *_strategies(base, overrides),
        *_references(base, overrides, num_partitions),
        *_variants(base, variants),
    ]


def _placed(entry: _Entry, setting: str, overrides: Mapping[str, FlatConfig]) -> _Entry:
    """An entry under its setting, with the overrides that are named after both."""
    placed = replace(entry, setting=setting)
    own = overrides.get(placed.group) if setting else None
    if own is None:
        return placed
    return replace(placed, flat={**entry.flat, **own}, where=f"study.overrides {placed.group}: ")


def _strategies(config: RunConfig, overrides: Mapping[str, FlatConfig]) -> Iterator[_Entry]:
    for name, strategy in _named(config.study.strategies):
        flat = {**to_flat(config), "strategy.name": strategy, **overrides.get(name, {})}
        yield _Entry(name, "strategy", flat, f"study.overrides {name}: " if name in overrides else "")


def _named(strategies: str) -> list[tuple[str, str]]:
    """Name and strategy of each: ``STRATEGY``, ``module:Class`` (named after the class), ``NAME=STRATEGY``.

    >>> _named("fedavg, own:Rule, mixed=flora")
    [('fedavg', 'fedavg'), ('Rule', 'own:Rule'), ('mixed', 'flora')]
    """
    entries = [entry.rpartition("=") for entry in name_list(strategies)]
    return [(name.strip() or s.rpartition(":")[2], s.strip()) for name, _, s in entries]


def _variants(config: RunConfig, variants: Mapping[str, FlatConfig]) -> Iterator[_Entry]:
    for name, keys in variants.items():
        yield _Entry(name, "variant", {**to_flat(config), **keys}, f"study.variants {name}: ")


def _references(
    config: RunConfig, overrides: Mapping[str, FlatConfig], num_partitions: int
) -> Iterator[_Entry]:
    names = name_list(config.study.references)
    if not names:
        return
    fedavg = {"strategy.name": "fedavg", "strategy.options": "", **overrides.get("fedavg", {})}
    flat = {**to_flat(config), **fedavg}
    base = _checked(flat, "study.overrides fedavg: " if "fedavg" in overrides else "")
    for name in names:
        keys = _centralised(base, num_partitions) if name == "centralised" else _local_only()
        yield _Entry(name, "reference", {**flat, **keys, **base.measured_once}, f"study.references {name}: ")


def _centralised(base: RunConfig, num_partitions: int) -> FlatConfig:
    """One client with all data: the same sequential steps, and the same number of examples each round.

    Under ``client-groups`` with unequal steps or batches the number of examples is that of an average round.
    """
    sampled = max(base.min_train_nodes, int(base.fraction_train * num_partitions + 1e-9))
    sampled = min(sampled, num_partitions)
    if base.partitions:
        raise ConfigError(
            f"study.references = 'centralised': it has everybody's data, "
            f"but partitions = {base.partitions!r} leaves some out"
        )
    if base.train.local_epochs and sampled < num_partitions:
        raise ConfigError(
            f"study.references = 'centralised': with train.local-epochs = {base.train.local_epochs} "
            f"and {sampled} of {num_partitions} clients a round it would see more data; use train.local-steps"
        )
    everyone = range(num_partitions)
    seen = sum(base.local_steps_of(k) * base.train_of(k).batch_size for k in everyone) / num_partitions
    return {
        **ALONE,
        "data.partitioner": "iid",
        "data.num-partitions": 1,
        "train.batch-size": round(sampled * seen / base.train.local_steps),
        "lora.rank": max(base.rank_of(k) for k in everyone),
    }


def _local_only() -> FlatConfig:
    """Every client trains in every round, on its own."""
    return {
        "strategy.name": "local-only",
        "model.head": "local",
        "lora.personal-rank": 0,
        "lora.personal-weights": "one",
        "fraction-train": 1.0,
    }


# --- checks ------------------------------------------------------------------------------------------


def _cell(entry: _Entry, seed: int, *, several: bool) -> Cell:
    label = f"{entry.group}-seed-{seed}" if several else entry.group
    flat = {**entry.flat, **to_flat(StudyConfig(), "study."), "seed": seed}
    config = _checked(flat, entry.where)
    return Cell(
        label=label,
        kind=entry.kind,
        seed=seed,
        config=config,
        group=entry.group,
        method=entry.method,
        setting=entry.setting,
    )


def _checked(flat: FlatConfig, where: str) -> RunConfig:
    try:
        config = from_flat(flat)
        make_rule(config.strategy.name, config.strategy.option_dict)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None
    return config


def _objects(study: StudyConfig, name: str) -> dict[str, FlatConfig]:
    """``study.overrides`` or ``study.variants`` as flat configurations by name."""
    decoded: dict[str, FlatConfig] = {}
    taken = ("seed", "output-dir", *(("strategy.name",) if name == "overrides" else ()))
    for entry, keys in study.objects[name].items():
        where = f"study.{name} {entry}"
        if not isinstance(keys, dict):
            raise ConfigError(f"{where} = {keys!r}: must be a JSON object of keys and values")
        decoded[entry] = _flat(keys, where)
        for key in decoded[entry]:
            if key in taken or key.startswith("study."):
                raise ConfigError(f"{where}: {key} cannot be set here, the study itself sets it")
    return decoded


def _flat(keys: Mapping[str, Any], where: str) -> FlatConfig:
    try:
        return flatten(keys)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_names(study: StudyConfig, overrides: Mapping[str, FlatConfig], groups: set[str]) -> None:
    listed = [name for name, _ in _named(study.strategies)]
    _refuse_repetition("study.strategies", listed)
    _refuse_repetition("study.references", name_list(study.references))
    _refuse_repetition("study.seeds", [str(seed) for seed in study.seed_list])
    for name in overrides:
        if name not in listed and name not in groups:
            raise ConfigError(
                f"study.overrides {name}: not one of study.strategies = {study.strategies!r}, nor one of "
                "them or of the variants under a setting, STRATEGY-SETTING"
            )


def _refuse_repetition(key: str, names: list[str] | tuple[str, ...]) -> None:
    seen: set[str] = set()
    for name in names:
        if not FILE_NAME.fullmatch(name):
            raise ConfigError(f"{key}: {name!r} names a directory, use letters, digits, '.', '_' and '-'")
        if name.casefold() in seen:
            raise ConfigError(f"{key}: {name!r} is there more than once")
        seen.add(name.casefold())
