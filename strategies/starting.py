"""Start of a strategy: shapes and factors out of a PEFT state dict, of whatever rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedlora import wire
from fedlora.core.base_patches import Patch
from fedlora.core.decompositions import completed, split
from fedlora.core.factors import AdapterSet, LoraFactors, Product, as_product
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ModuleSpec, Template
from fedlora.errors import ConfigError, FactorShapeError, UpdateRefused
from strategies.rule import Rule

WHERE_FROM = "pass ArrayRecord(get_peft_model_state_dict(model))"


def template_of(arrays: ArrayRecord, scaling: float, rule: Rule, rank: int = 0, seed: int = 0) -> Template:
    """Template of the model in a PEFT state dict; a drawn A is replaced where the rule asks for it.

    An adapter of another rank, for instance the arrays of an earlier run, goes on at ``rank``: by its SVD the
    strongest directions stay an adapter, the others become the first base patch.

    Args:
        arrays: PEFT's state dict of an adapter.
        scaling: alpha / r of the adapter.
        rule: which aggregates from here on.
        rank: of the adapter that clients train; 0 is that of ``arrays``.
        seed: draws directions that an adapter of a lower rank has not.

    Raises:
        ConfigError: a scaling that is none, no LoRA factors of linear layers, modules of unequal rank
            without ``rank``, or directions over ``rank`` that the rule has no place for.
    """
    if not (math.isfinite(scaling) and scaling > 0):
        raise ConfigError(f"scaling = {scaling}: must be alpha / r of the PEFT model, finite and > 0")
    parts = _parts(arrays)
    given = {n: _factors(n, own, scaling) for n, own in parts.layers.items()}
    ranks = {f.rank for f in given.values()}
    if not rank and len(ranks) > 1:
        raise ConfigError(
            f"initial_arrays has ranks {sorted(ranks)}: modules of several ranks need rank=, that of the "
            "clients' PEFT models"
        )
    template = Template(
        modules={
            n: ModuleSpec(out_features=f.out_features, in_features=f.in_features) for n, f in given.items()
        },
        rank=rank or max(ranks),
        scaling=scaling,
        head=parts.head,
    )
    if not any(f.B.any() for f in given.values()):
        drawn = rule.init_a != "kaiming" or ranks != {template.rank}
        return template if drawn else replace(template, adapters=given)
    return _going_on(template, given, rule, seed)


def _going_on(template: Template, given: AdapterSet, rule: Rule, seed: int) -> Template:
    """The template with the given adapters at its rank, and what is over as a change of the base."""
    adapters, over = AdapterSet(), dict[str, Product]()
    for name, factors in given.items():
        adapters[name] = factors
        if factors.rank != template.rank:
            best, rest = split(as_product(factors), template.rank, template.scaling)
            adapters[name] = completed(best, factors.A, torch_stream(seed, "going-on", name))
            if rest.rank_bound:
                over[name] = rest
    if over and not rule.facts.updates_base:
        name = next(iter(over))
        raise ConfigError(
            f"initial_arrays: {name} has rank {given[name].rank}, {rule.facts.name} would lose what is over "
            f"rank = {template.rank}: set rank={given[name].rank}, or take a rule that moves the base"
        )
    return replace(template, adapters=adapters, base=Patch(over) if over else None)


def _parts(arrays: ArrayRecord) -> wire.PeftTensors:
    try:
        tensors = wire.from_record(arrays)
    except UpdateRefused as error:
        raise ConfigError(f"initial_arrays: {error}") from None
    parts = wire.from_peft(tensors)
    if not parts.layers or set(parts.of("A")) != set(parts.of("B")):
        raise ConfigError(f"initial_arrays holds no pairs of lora_A and lora_B: {WHERE_FROM}")
    for key, tensor in tensors.items():
        if not key.startswith(wire.PREFIX):
            raise ConfigError(f"initial_arrays: {key}: PEFT's names begin with {wire.PREFIX}, {WHERE_FROM}")
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"initial_arrays: {key} holds a NaN or an infinity")
    cored = parts.of("R")
    for name in (*cored, *parts.head):
        if name in cored or any(part.startswith("lora_") for part in name.split(".")):
            raise ConfigError(
                f"initial_arrays: {name}: only lora_A and lora_B of linear layers can be federated, "
                f"{WHERE_FROM} of a plain LoRA model"
            )
    return parts


def _factors(name: str, own: Mapping[str, Tensor], scaling: float) -> LoraFactors:
    try:
        return LoraFactors(own["A"], own["B"], scaling)
    except FactorShapeError as error:
        raise ConfigError(f"initial_arrays: {name}: {error}: only linear layers can be federated") from None
