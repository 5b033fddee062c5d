"""The strategies under the names that Flower's users expect, one class for each rule.

Keyword arguments are those of `FactorStrategy`, the rule's own options (``lam``, ``period``, ``init_a``,
...), and, where the aggregate is a mean, ``center`` (see `strategies.robust`) and ``optimizer`` (see
`strategies.server_optimizer`).
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from strategies.flower import FactorStrategy
from strategies.registry import COMPOSED, make_rule
from strategies.rule import Rule
from strategies.rules.fed_sb import FedSBRule
from strategies.rules.fedavg import FedAvgRule
from strategies.rules.fedex import FedExRule
from strategies.rules.fedmomentum import FedMomentumRule
from strategies.rules.fedrot import FedRotRule
from strategies.rules.fedsa import FedSARule
from strategies.rules.fedsvd import FedSVDRule
from strategies.rules.fedsvd_renew import FedSVDRenewRule
from strategies.rules.ffa import FFALoRARule
from strategies.rules.flexlora import FlexLoRARule
from strategies.rules.flora import FLoRARule
from strategies.rules.florist import FLoRISTRule
from strategies.rules.head_only import HeadOnlyRule
from strategies.rules.hetlora import HetLoRARule
from strategies.rules.lora_fair import LoRAFAIRRule
from strategies.rules.rolora import RoLoRARule
from strategies.rules.zero_padding import ZeroPaddingRule

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
    """Averages A and B apart; see `strategies.rules.fedavg`."""

    rule_type = FedAvgRule


class FFALoRA(_Named):
    """Freezes A and averages B; see `strategies.rules.ffa`."""

    rule_type = FFALoRARule


class FLoRA(_Named):
    """Stacks all adapters into the base; see `strategies.rules.flora`."""

    rule_type = FLoRARule


class FLoRIST(_Named):
    """Stacks the strongest directions into the base; see `strategies.rules.florist`."""

    rule_type = FLoRISTRule


class FlexLoRA(_Named):
    """Keeps the best rank-r approximation of the mean product; see `strategies.rules.flexlora`."""

    rule_type = FlexLoRARule


class FedExLoRA(_Named):
    """Averages A and B apart, the remainder moves into the base; see `strategies.rules.fedex`."""

    rule_type = FedExRule


class LoRAFAIR(_Named):
    """Averages A, corrects B; see `strategies.rules.lora_fair`."""

    rule_type = LoRAFAIRRule


class FedSVD(_Named):
    """Averages B and refactors B A; see `strategies.rules.fedsvd`."""

    rule_type = FedSVDRule


class ZeroPadding(_Named):
    """Averages A and B padded to one rank; see `strategies.rules.zero_padding`."""

    rule_type = ZeroPaddingRule


class FedMomentum(_Named):
    """Keeps the strongest directions, the others move into the base; see `strategies.rules.fedmomentum`."""

    rule_type = FedMomentumRule


class FedSVDRenew(_Named):
    """As FedSVD, and renews the weakest directions of A; see `strategies.rules.fedsvd_renew`."""

    rule_type = FedSVDRenewRule


class FedSALoRA(_Named):
    """Averages A, leaves B with its client; see `strategies.rules.fedsa`."""

    rule_type = FedSARule


class FedSB(_Named):
    """Freezes A and B, averages a core; see `strategies.rules.fed_sb`. For fedlora's ClientApp."""

    rule_type = FedSBRule


class HetLoRA(_Named):
    """Pads ranks, weighs by size, prunes ranks; see `strategies.rules.hetlora`."""

    rule_type = HetLoRARule


class RoLoRA(_Named):
    """Trains and averages B and A in turn; see `strategies.rules.rolora`."""

    rule_type = RoLoRARule


class FedRotLoRA(_Named):
    """Rotates clients' factors onto each other, averages them; see `strategies.rules.fedrot`."""

    rule_type = FedRotRule


class HeadOnly(_Named):
    """Trains the head alone, the control; see `strategies.rules.head_only`."""

    rule_type = HeadOnlyRule
