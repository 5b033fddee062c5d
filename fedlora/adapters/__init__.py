"""Kinds of adapters by ``lora.method``, and why others are not to be had (docs/peft.md)."""

from __future__ import annotations

import dataclasses
import json

from fedlora.adapters.kind import AdapterKind, InjectedAdapter, is_affine
from fedlora.adapters.lora import LoraKind
from fedlora.adapters.tuners import TUNERS, Tuner, TunerKind
from fedlora.config import LoraConfig
from fedlora.errors import ConfigError, unknown_name

__all__ = [
    "KINDS",
    "NOT_HERE",
    "TUNERS",
    "AdapterKind",
    "InjectedAdapter",
    "LoraKind",
    "TunerKind",
    "adapter_kind",
    "check_kind",
    "is_affine",
]

KINDS = ("lora", *TUNERS)
"""The values of ``lora.method``."""
MISS = (
    "its update is linear in one matrix, which is LoRA with a fixed A: strategy.init-a = 'miss' with "
    "strategy.name = 'ffa'"
)
NEITHER = "its weight is affine in no part of what clients would send, so that no mean of it is honest"
NOT_HERE = {
    "dora": (
        "its weight m (W + s B A) / ||W + s B A|| is not linear in what clients would send, so that no mean "
        "of it is the mean of their weights"
    ),
    "miss": MISS,
    "bone": MISS,
    "adalora": (
        "each client prunes directions of its own, whose singular values cannot be averaged "
        "(strategy.name = 'hetlora' prunes ranks)"
    ),
    "loftq": (
        "its 4-bit base is made together with A and B, and here the base is the same whatever a run starts "
        "from"
    ),
    **dict.fromkeys(("oft", "boft", "hra", "road", "delora", "lily", "peanut"), NEITHER),
    **dict.fromkeys(
        ("vblora", "unilora", "tinylora"),
        "its layers share a trained tensor, and here each tensor belongs to one layer",
    ),
}
"""By ``lora.method``: what is refused, with the reason."""


def adapter_kind(config: LoraConfig, seed: int) -> AdapterKind:
    """The kind of a checked configuration, see `check_kind`; ``seed`` is the run's."""
    if config.method == "lora":
        return LoraKind()
    return TunerKind(
        tuner=TUNERS[config.method],
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        options=json.dumps(config.method_option_dict, sort_keys=True),
        seed=seed,
    )


def check_kind(config: LoraConfig) -> None:
    """Refuse what a method does not have.

    Raises:
        ConfigError: no such method, one that is not to be had, an option that it lacks, or a rank, alpha or
            dropout that it has no place for.
    """
    method, options = config.method, config.method_option_dict
    key = f"lora.method = {method!r}"
    if method in NOT_HERE:
        raise ConfigError(f"{key}: {NOT_HERE[method]}, accepted are {', '.join(KINDS)}")
    if method not in KINDS:
        raise unknown_name("lora.method", method, KINDS)
    if method == "lora":
        if options:
            raise ConfigError(
                f"lora.method-options = {config.method_options!r}: of other methods, must be empty"
            )
        return
    tuner = TUNERS[method]
    for option in options:
        if option not in tuner.fields:
            raise ConfigError(
                f"lora.method-options {option} = {options[option]!r}: {method} accepts "
                f"{', '.join(tuner.fields)}"
            )
    _check_unused(config, tuner)


def _check_unused(config: LoraConfig, tuner: Tuner) -> None:
    """Refuse a setting of LoRA that the tuner would ignore."""
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    for name, ours in (("rank", tuner.rank), ("alpha", tuner.alpha), ("dropout", tuner.dropout)):
        value = getattr(config, name)
        if not ours and value != defaults[name]:
            raise ConfigError(
                f"lora.{name} = {value}: {tuner.name} has none, leave it at {defaults[name]}; its own are "
                f"lora.method-options: {', '.join(tuner.fields)}"
            )
    if config.use_rslora or config.ranks:
        name, value = ("use-rslora", "true") if config.use_rslora else ("ranks", repr(config.ranks))
        raise ConfigError(f"lora.{name} = {value}: is of lora alone, {tuner.name} has one rank for all")
