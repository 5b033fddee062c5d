"""Adapters that were trained apart as one round of a rule.

The round starts from a zero product, B = 0. What a rule freezes must therefore be the same in all adapters.
A module that an adapter does not have is a change of zero: B = 0 there, A the mean of the others' A, and its
weight stays in the sum. The global rank of a module is the largest, the global scaling that of the first
adapter of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlora.core.factors import PLAIN, AdapterSet, LoraFactors
from fedlora.core.state import ClientUpdate, State, Template
from fedlora.errors import ConfigError, FactorShapeError
from fedlora.merge.group import AdapterGroup
from strategies.diagnostics import Diagnostics
from strategies.layer import Layer, Weighted, weighted_sum
from strategies.registry import RULES
from strategies.rule import Rule

SAME = 1e-6
"""Factors that differ by less, relative to their size, are one frozen factor."""


def check_rule(rule: Rule) -> None:
    """Refuse a rule to which one round of plain adapters means nothing.

    Raises:
        ConfigError: clients keep a factor, train one that PEFT does not have, or do not send B.
    """
    facts, trained = rule.facts, rule.trained(1)
    key = f"--strategy {facts.name}"
    if facts.personal:
        kept = " and ".join(sorted(facts.trained - facts.uploaded))
        raise ConfigError(f"{key}: clients keep {kept} to themselves, so there is no global adapter to write")
    if facts.by_client:
        raise ConfigError(f"{key}: clients have an adapter each, so there is no global adapter to write")
    if trained - PLAIN:
        named = " and ".join(sorted(trained - PLAIN))
        raise ConfigError(
            f"{key}: clients train {named}, which PEFT's adapters do not hold (they have A and B)"
        )
    if "B" not in rule.shipped(1):
        raise ConfigError(f"{key}: clients send no B, so a round from a zero product leaves a zero product")


@dataclass(frozen=True, slots=True)
class Round:
    """Result of the round.

    Attributes:
        state: after the round.
        diagnostics: what it did, see `strategies.diagnostics`.
        used: module -> the weight with which each adapter counted in it; 0 where it was left out.
    """

    state: State
    diagnostics: Diagnostics
    used: Mapping[str, Sequence[float]]


def one_round(rule: Rule, group: AdapterGroup, weights: Sequence[float]) -> Round:
    """The adapters after one round of the rule.

    Args:
        rule: one that `check_rule` accepts.
        group: the adapters.
        weights: one for each adapter, finite, >= 0, of a positive sum.

    Raises:
        ConfigError: ranks that the rule cannot mix, or a frozen factor that differs between adapters.
    """
    _check_ranks(rule, group)
    _check_frozen(rule, group)
    start = _start(group, weights)
    absent = {name: LoraFactors(f.A, torch.zeros_like(f.B), f.scaling) for name, f in start.items()}
    updates = [
        ClientUpdate(
            partition_id=position,
            adapters={name: member.adapters.get(name, absent[name]) for name in start},
            head=member.head,
            weight=weights[position],
        )
        for position, member in enumerate(group.members)
    ]
    largest = max(start.values(), key=lambda f: f.rank)
    template = Template(
        modules=group.modules,
        rank=largest.rank,
        scaling=largest.scaling,
        head=group.members[0].head,
        adapters=start,
    )
    before = rule.init(template, seed=0)
    try:
        state, diagnostics = rule.aggregate(before, updates)
    except FactorShapeError as error:
        raise ConfigError(f"--strategy {rule.facts.name}: {error}") from None
    assert diagnostics is not None
    return Round(state, diagnostics, {name: _used(rule, before, name, updates) for name in start})


def _used(rule: Rule, before: State, name: str, updates: Sequence[ClientUpdate]) -> list[float]:
    counted = [update for update in updates if update.weight > 0]
    total = sum(update.weight for update in counted)
    clients = [Weighted(u.weight / total, u.adapters[name], u.partition_id) for u in counted]
    used = iter(rule.weights(Layer(name, before.adapters[name], clients, server_round=1)))
    return [next(used) if update.weight > 0 else 0.0 for update in updates]


def _start(group: AdapterGroup, weights: Sequence[float]) -> AdapterSet:
    """B = 0, and the A that all have, or else the mean of what they have."""
    weight_of = {id(member): weight for member, weight in zip(group.members, weights, strict=True)}
    start: AdapterSet = {}
    for name in group.modules:
        holders = group.holders(name)
        largest = max((f for _, f in holders), key=lambda f: f.rank)
        p = [weight_of[id(member)] for member, _ in holders]
        if sum(p) == 0:
            p = [1.0] * len(p)
        A = largest.A
        if not all(_same(f.A, A) for _, f in holders):
            padded = (pad(f.A, (0, 0, 0, largest.rank - f.rank)) for _, f in holders)
            A = weighted_sum([weight / sum(p) for weight in p], padded)
        start[name] = LoraFactors(A, torch.zeros_like(largest.B), largest.scaling)
    return start


def _check_ranks(rule: Rule, group: AdapterGroup) -> None:
    if rule.facts.mixed_ranks and not rule.facts.draws_ranks:
        return
    for name in group.modules:
        (first, factors), *others = group.holders(name)
        for other, given in others:
            if given.rank != factors.rank:
                facts = (able.facts for able in RULES.values())
                mixing = (f for f in facts if f.mixed_ranks and not f.draws_ranks and "B" in f.uploaded)
                able = ", ".join(f.name for f in mixing)
                raise ConfigError(
                    f"--strategy {rule.facts.name} needs equal ranks: {name} has rank {factors.rank} in "
                    f"{first.path}, {given.rank} in {other.path} (mixed ranks: {able})"
                )


def _check_frozen(rule: Rule, group: AdapterGroup) -> None:
    for factor in sorted(PLAIN - rule.trained(1)):
        for name in group.modules:
            (first, mine), *others = group.holders(name)
            for other, given in others:
                here, there = mine.tensors()[factor], given.tensors()[factor]
                if not _same(here, there):
                    raise ConfigError(
                        f"--strategy {rule.facts.name} needs one frozen {factor} that all share: in {name} "
                        f"{first.path} and {other.path} differ{_by(here, there)}"
                    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= SAME * one.norm())


def _by(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f" ({tuple(one.shape)}, {tuple(other.shape)})"
    size = float(one.norm())
    return f" (by {float((one - other).norm()) / size:.2g} of its size)" if size > 0 else ""


def check_weights(weights: Sequence[float], group: AdapterGroup) -> None:
    """Refuse weights that no mean can be taken with.

    Raises:
        ConfigError: not one for each adapter, negative, not finite, or without a positive finite sum.
    """
    shown = f"--weights = {_listed(weights)}"
    if len(weights) != len(group.members):
        raise ConfigError(f"{shown}: {len(weights)} weights for {len(group.members)} adapters")
    for weight, member in zip(weights, group.members, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"{shown}: {weight:g} for {member.path}: must be finite and >= 0")
    if not 0 < sum(weights) < math.inf:
        raise ConfigError(f"{shown}: their sum must be finite and > 0")


def _listed(weights: Sequence[float]) -> str:
    return ",".join(f"{weight:g}" for weight in weights)
