"""Whether the mean of what clients ship is the mean of their weights: of LoRA declared, of others measured.

With everything else held, the weight of a layer is an affine function of the tensors that a round trains, or
it is not; `is_affine` asks the layer itself. A rule that trains one part a round may be exact where a rule
that trains all at once is not.
"""

from __future__ import annotations

from fedlora.adapters import is_affine
from fedlora.core.adapters import Adapters, tensor_names
from fedlora.core.factors import LoraFactors
from fedlora.errors import NotApplicable
from fedlora.models import AdaptedModel
from strategies.rule import Rule


def rounds(adapters: Adapters) -> range:
    """Rounds after which every rule repeats what it trains: one for each tensor, and at least two."""
    return range(1, 1 + max(2, len(tensor_names(adapters))))


def check_parts(rule: Rule, method: str, adapters: Adapters) -> None:
    """Refuse a rule that would train or ship nothing of these adapters, although it means to.

    Raises:
        NotApplicable: a rule of two parts for a method that has one.
    """
    layers = adapters.values()
    for number in rounds(adapters):
        idle = rule.trained(number) and not rule.trained_names(layers, number)
        silent = rule.shipped(number) and not rule.shipped_names(layers, number)
        if idle or silent:
            raise NotApplicable(
                f"strategy.name = {rule.facts.name!r}: tells two parts of an adapter apart, {method} has one "
                "(fedavg trains and averages it whole)"
            )


def mean_is_exact(rule: Rule, model: AdaptedModel, adapters: Adapters) -> bool:
    """Whether a round's effective global weight is W_before + sum_k p_k dW_k.

    Args:
        rule: of the run, with its centre and server optimiser.
        model: with the adapter inside; it stays as it is.
        adapters: what a round starts from.
    """
    if not rule.plain:
        return False
    if isinstance(next(iter(adapters.values())), LoraFactors) or not rule.facts.global_adapter:
        return rule.facts.exact
    sizes = {name: spec.out_features * spec.in_features for name, spec in model.modules.items()}
    smallest: dict[frozenset[str], str] = {}  # one layer of each set of names
    for name in sorted(sizes, key=lambda module: (sizes[module], module)):
        smallest.setdefault(frozenset(adapters[name].tensors()), name)
    parts = {(n, rule.trained_names([adapters[n]], t)) for n in smallest.values() for t in rounds(adapters)}
    return all(is_affine(model.adapter, model.module, name, part) for name, part in parts if part)
