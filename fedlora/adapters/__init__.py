"""Kinds of adapters by ``lora.method``, and why others are not to be had (docs/peft.md)."""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module

from fedlora.adapters.kind import AdapterKind, InjectedAdapter, is_affine
from fedlora.adapters.lora import LoraKind
from fedlora.adapters.tuners import TUNERS, Tuner, TunerKind
from fedlora.config import LoraConfig
from fedlora.core.code import import_own
from fedlora.errors import ConfigError, unknown_name

__all__ = [
    "KINDS",
    "NOT_HERE",
    "TUNERS",
    "AdapterKind",
    "InjectedAdapter",
    "LoraKind",
    "Tuner",
    "TunerKind",
    "adapter_kind",
    "check_kind",
    "is_affine",
]

KINDS = ("lora", *TUNERS)
"""The values of ``lora.method``."""
NEITHER = "its weight is affine in no part of what clients would send, so that no mean of it is honest"
NOT_HERE = {
    "dora": (
        "its weight m (W + s B A) / ||W + s B A|| is not linear in what clients would send, so that no mean "
        "of it is the mean of their weights"
    ),
    "bone": "PEFT calls it miss",
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
        tuner=tuner_named(config.method),
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        options=json.dumps(config.method_option_dict, sort_keys=True),
        seed=seed,
    )


def tuner_named(method: str) -> Tuner:
    """The tuner of a listed name, or the `Tuner` of one's own behind ``module:NAME``.

    Raises:
        ConfigError: there is none, or PEFT has no configuration of the name that it says.
    """
    if method in TUNERS:
        return TUNERS[method]
    if ":" not in method:
        raise unknown_name("lora.method", method, KINDS, ", and module:TUNER of your own")
    found = import_own("lora.method", method)
    if not isinstance(found, Tuner):
        raise ConfigError(f"lora.method = {method!r}: is no fedlora.adapters.Tuner")
    if not hasattr(import_module("peft"), found.config):
        raise ConfigError(f"lora.method = {method!r}: PEFT has no configuration {found.config!r}")
    return found


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
    if method == "lora":
        if options:
            raise ConfigError(
                f"lora.method-options = {config.method_options!r}: of other methods, must be empty"
            )
        return
    tuner = tuner_named(method)
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
