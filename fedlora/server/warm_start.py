"""Warm start: a PEFT adapter's values in place of drawn ones, where it fits the run to the last layer.

The state before round 1 is then what it would be after a round that ended with this adapter. What a rule
makes of it is its own `strategies.rule.Rule.init`: most go on training these very factors; FLoRA and FLoRIST,
whose clients draw a new A each round, put the product into the base. An adapter that was trained on examples
of the run's clients tells of them, whatever the run itself protects.
"""

from __future__ import annotations

import math
from dataclasses import replace

from clients.runtime import ClientRuntime
from fedlora.config import RunConfig
from fedlora.core.factors import Tensors
from fedlora.core.files import user_path
from fedlora.core.state import Template
from fedlora.errors import ConfigError, FactorShapeError
from fedlora.models import AdapterCard
from fedlora.models.card import absolute
from fedlora.models.peft_files import PeftAdapter, read_adapter

CLOSE = 1e-6
"""Relative difference of two scalings that are the same number."""


def warm_start(template: Template, config: RunConfig, runtime: ClientRuntime) -> Template:
    """The template with the adapter, and where the run trains one the head, of ``model.adapter``.

    Raises:
        ConfigError: it cannot be read, or has another base, rank, scaling, layers, labels or head.
    """
    key = f"model.adapter = {config.model.adapter!r}"
    try:
        given = read_adapter(user_path(config.model.adapter))
    except ConfigError as error:
        raise ConfigError(f"model.adapter: {error}") from None
    _check_base(key, given, config, runtime)
    _check_layers(key, given, template)
    for name, factors in given.adapters.items():
        if factors.rank != template.rank:
            raise ConfigError(
                f"{key}: has rank {factors.rank} in {name}, the run has lora.rank = {template.rank}"
            )
        if not math.isclose(factors.scaling, template.scaling, rel_tol=CLOSE):
            raise ConfigError(
                f"{key}: has scaling {factors.scaling:g} in {name}, the run has {template.scaling:g} "
                f"(lora.alpha = {config.lora.alpha:g})"
            )
    adapters = {name: replace(given.adapters[name], scaling=template.scaling) for name in template.modules}
    head = _head(key, given, config, runtime)
    try:
        runtime.model.check(adapters, head)
    except FactorShapeError as error:
        raise ConfigError(f"{key}: {error}") from None
    return replace(template, adapters=adapters, head=template.head | head)


def _check_base(key: str, given: PeftAdapter, config: RunConfig, runtime: ClientRuntime) -> None:
    """By the names of the bases; where fedlora wrote the adapter also by task, labels and quantisation."""
    labels = tuple(runtime.data.label_names)
    mine = AdapterCard(
        model=config.model,
        label_names=labels,
        max_length=config.data.max_length,
        seed=config.seed,
        task=config.task,
    )
    named = given.config.identity["base_model_name_or_path"]
    pairs: list[tuple[str, object, object]] = []
    if given.card is None or mine.base_name is not None:
        pairs.append(("base", absolute(named), mine.base_name or config.model.name))
    if given.card is not None:
        theirs = given.card
        if mine.base_name is None:
            pairs.append(("base", theirs.model.name, config.model.name))
        pairs += [
            ("task", theirs.task, config.task),
            ("model.pooling", theirs.model.pooling, config.model.pooling),
            ("model.quantization", theirs.model.quantization, config.model.quantization),
            ("labels", ", ".join(theirs.label_names), ", ".join(labels)),
        ]
    for what, theirs_is, mine_is in pairs:
        if theirs_is != mine_is:
            raise ConfigError(f"{key}: has {what} {theirs_is!r}, the run has {mine_is!r}")


def _check_layers(key: str, given: PeftAdapter, template: Template) -> None:
    for name in sorted(given.adapters.keys() ^ template.modules.keys()):
        theirs, mine = ("adapts", "does not") if name in given.adapters else ("does not adapt", "does")
        raise ConfigError(f"{key}: {theirs} {name}, the run {mine} (lora.target-modules)")
    if given.frozen:
        raise ConfigError(
            f"{key}: has weights of the base beside it ({min(given.frozen)}), which the run has not"
        )


def _head(key: str, given: PeftAdapter, config: RunConfig, runtime: ClientRuntime) -> Tensors:
    """The adapter's head, where the run trains and averages one; else nothing."""
    drawn, initial = runtime.model.drawn, runtime.model.initial_head
    trained = {name: t for name, t in given.head.items() if name not in drawn}
    averaged = config.model.head == "train"
    fixed = drawn if averaged else drawn | initial
    for name, tensor in sorted(given.head.items()):
        if name in fixed and not tensor.equal(fixed[name]):
            why = f"seed = {config.seed} draws it" if name in drawn else f"model.head = {config.model.head!r}"
            raise ConfigError(f"{key}: has a {name} of its own, which stays as it is in the run ({why})")
    return trained if averaged else {}
