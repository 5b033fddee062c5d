"""Rounds of which no two updates are in memory at once, for rules whose aggregate is a plain mean.

    X <- X + w_k X_k,   W <- W + w_k   (k in partition order);     X / W

gives one virtual client of weight 1 with the mean of the clients' factors (scalings folded into B), and a
mean rule makes of it what it makes of them all. Equal to `Rule.aggregate` up to rounding (the weights are
divided out at the end), and without diagnostics: these need the clients side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from fedlora.core.factors import Tensors
from fedlora.core.parallel import one_thread
from fedlora.core.state import ClientUpdate, State
from fedlora.errors import ConfigError
from strategies.checks import check_heads
from strategies.mean import MeanRule
from strategies.rule import Rule


def aggregate_stream(rule: Rule, state: State, updates: Iterable[ClientUpdate]) -> State:
    """The state after a round whose updates come one after the other.

    Args:
        rule: one whose aggregate is a plain mean.
        state: before the round; untouched.
        updates: in ascending order of their partitions, consumed one by one.

    Raises:
        ConfigError: a rule that is no plain mean, updates out of order, or weights as in `Rule.aggregate`.
        FactorShapeError: as `Rule.aggregate`.
    """
    if not streams(rule):
        raise ConfigError(f"{rule.facts.name} needs all updates at once: only plain means can be streamed")
    assert isinstance(rule, MeanRule)
    total, previous, mean, starts = 0.0, -1, None, rule.parted(state, state.adapters)
    with one_thread():
        for update in updates:
            if update.partition_id <= previous:
                raise ConfigError(f"partition {update.partition_id} comes after {previous}: ascending order")
            previous = update.partition_id
            if not (math.isfinite(update.weight) and update.weight >= 0):
                raise ConfigError(f"partition {previous}: weight {update.weight} must be finite and >= 0")
            rule.check(starts, update, state.round + 1)
            if update.weight > 0:
                total += update.weight
                mean = _added(mean, update, rule, replace(state, adapters=starts))
    if mean is None or not math.isfinite(total):
        raise ConfigError(f"the weights of all updates sum to {total:g}: nothing can be averaged")
    for adapter in mean.adapters.values():
        for name in rule.shipped_names([adapter], state.round + 1) & adapter.tensors().keys():
            adapter.tensors()[name].div_(total)
    for tensor in mean.head.values():
        tensor.div_(total)
    return rule.aggregate(state, [mean], diagnostics=False)[0]


def streams(rule: Rule) -> bool:
    """Whether a rule's aggregate is a plain weighted mean, tensor by tensor."""
    return isinstance(rule, MeanRule) and type(rule).middle is MeanRule.middle and rule.center.is_mean


def _added(mean: ClientUpdate | None, update: ClientUpdate, rule: MeanRule, state: State) -> ClientUpdate:
    """The running sums with one more update; factors that nobody ships stay those of the server."""
    shipped = {name: rule.shipped_names([a], state.round + 1) for name, a in state.adapters.items()}
    if mean is None:
        mean = _zero(update, state, shipped)
    if set(mean.head) != set(update.head):
        check_heads(state.head, [mean, update])
    for name, factors in update.adapters.items():
        ratio = factors.scaling / state.adapters[name].scaling
        given, sums = factors.tensors(), mean.adapters[name].tensors()
        for factor in shipped[name] & given.keys():
            weight = update.weight * (1.0 if factor == "A" else ratio)
            sums[factor].add_(given[factor], alpha=weight)
    for name, tensor in update.head.items():
        mean.head[name].add_(tensor, alpha=update.weight)
    return mean


def _zero(update: ClientUpdate, state: State, shipped: Mapping[str, frozenset[str]]) -> ClientUpdate:
    check_heads(state.head, [update])
    adapters = {
        name: f.replaced({k: torch.zeros_like(t) for k, t in f.tensors().items() if k in shipped[name]})
        for name, f in state.adapters.items()
    }
    head: Tensors = {name: tensor.new_zeros(tensor.shape) for name, tensor in update.head.items()}
    return ClientUpdate(partition_id=0, adapters=adapters, head=head, weight=1.0)
