"""The strategies under the names that Flower's users expect, one class for each rule.

Keyword arguments are those of `FactorStrategy`, the rule's own options (``lam``, ``period``, ``init_a``,
...), and, where the aggregate is a mean, ``center`` (see `strategies.robust`) and ``optimizer`` (see
`strategies.server_optimizer`).
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from strategies.fedavg import FedAvgRule
from strategies.fedsvd import FedSVDRule
from strategies.fedsvd_renew import FedSVDRenewRule
from strategies.ffa import FFALoRARule
from strategies.flora import FLoRARule
from strategies.flower import FactorStrategy
from strategies.head_only import HeadOnlyRule
from strategies.lora_fair import LoRAFAIRRule
from strategies.registry import COMPOSED, make_rule
from strategies.rule import Rule

SHARED = frozenset(inspect.signature(FactorStrategy.__init__).parameters) - {"self", "rule"}


class _Named(FactorStrategy):
    """A `FactorStrategy` whose rule is given by its class.

    Raises:
        ConfigError: an option that neither the strategy nor its rule has, or a value they refuse.
    """

    rule_type: ClassVar[type[Rule]]

    def __init__(self, **options: Any) -> None:
        shared = {key: value for key, value in options.items() if key in SHARED}
        own = {key: value for key, value in options.items() if key not in SHARED}
        composed = {key: own.pop(key) for key in COMPOSED if key in own}
        super().__init__(make_rule(self.rule_type.facts.name, own, **composed), **shared)


class FedAvg(_Named):
    """Averages A and B apart; see `strategies.fedavg`."""

    rule_type = FedAvgRule


class FFALoRA(_Named):
    """Freezes A and averages B; see `strategies.ffa`."""

    rule_type = FFALoRARule


class FLoRA(_Named):
    """Stacks all adapters into the base; see `strategies.flora`."""

    rule_type = FLoRARule


class LoRAFAIR(_Named):
    """Averages A, corrects B; see `strategies.lora_fair`."""

    rule_type = LoRAFAIRRule


class FedSVD(_Named):
    """Averages B and refactors B A; see `strategies.fedsvd`."""

    rule_type = FedSVDRule


class FedSVDRenew(_Named):
    """As FedSVD, and renews the weakest directions of A; see `strategies.fedsvd_renew`."""

    rule_type = FedSVDRenewRule


class HeadOnly(_Named):
    """Trains the head alone, the control; see `strategies.head_only`."""

    rule_type = HeadOnlyRule
