"""The rules by name: one explicit dictionary, from which tables, tests and refusals are made.

A rule of one's own needs no entry: ``strategy.name`` may be ``module:Class`` (see docs/strategy.md).
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedlora.errors import ConfigError, NotApplicable, named_line
from strategies.center import Center
from strategies.fed_sb import FedSBRule
from strategies.fedavg import FedAvgRule
from strategies.fedex import FedExRule
from strategies.fedmomentum import FedMomentumRule
from strategies.fedrot import FedRotRule
from strategies.fedsa import FedSARule
from strategies.fedsvd import FedSVDRule
from strategies.fedsvd_renew import FedSVDRenewRule
from strategies.ffa import FFALoRARule
from strategies.flexlora import FlexLoRARule
from strategies.flora import FLoRARule
from strategies.florist import FLoRISTRule
from strategies.head_only import HeadOnlyRule
from strategies.hetlora import HetLoRARule
from strategies.local_only import LocalOnlyRule
from strategies.lora_fair import LoRAFAIRRule
from strategies.mean import MeanRule
from strategies.rolora import RoLoRARule
from strategies.rule import Rule
from strategies.server_optimizer import ServerOptimizer
from strategies.zero_padding import ZeroPaddingRule

LISTED: tuple[type[Rule], ...] = (
    FedAvgRule,
    FFALoRARule,
    FLoRARule,
    FLoRISTRule,
    FlexLoRARule,
    FedExRule,
    LoRAFAIRRule,
    FedSVDRule,
    HetLoRARule,
    ZeroPaddingRule,
    RoLoRARule,
    FedSARule,
    FedSBRule,
    FedMomentumRule,
    FedRotRule,
    FedSVDRenewRule,
    HeadOnlyRule,
    LocalOnlyRule,
)
"""In the order of the tables."""
RULES: dict[str, type[Rule]] = {rule.facts.name: rule for rule in LISTED}


COMPOSED = ("center", "optimizer")
"""Fields of a `MeanRule` that are no options of its own: what it is composed with."""


def make_rule(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    center: Center | None = None,
    optimizer: ServerOptimizer | None = None,
) -> Rule:
    """The rule of that name with its options (fields of its class), composed with what is given.

    Raises:
        NotApplicable: a robust centre or a server optimiser for a rule whose aggregate is no mean.
        ConfigError: an unknown name or option, or a value that the rule refuses.

    >>> make_rule("fedsvd", {"period": 2}).period
    2
    """
    rule = rule_type(name)
    fields = option_fields(rule)
    for key, value in (options or {}).items():
        if key not in fields:
            raise ConfigError(
                f"strategy.options {key} = {value!r}: {name} accepts {', '.join(fields) or 'none'}"
            )
        expected = type(fields[key].default)
        if expected is float and type(value) is int:
            continue
        if type(value) is not expected:
            raise ConfigError(f"strategy.options {key} = {value!r}: {name} expects {expected.__name__}")
    composed = _composed(rule, center, optimizer)
    return rule(**(options or {}), **composed)


def rule_type(name: str) -> type[Rule]:
    """The class behind a name, listed or ``module:Class``; modules are also looked for where one stands.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in RULES:
        return RULES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        near = get_close_matches(name, RULES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"strategy.name = {name!r}{hint}: accepted are {', '.join(RULES)}, and module:Class of your own"
        )
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(f"strategy.name = {name!r}: cannot be imported ({named_line(error)})") from None
    finally:
        sys.path.remove(here)
    if not (isinstance(found, type) and issubclass(found, Rule) and hasattr(found, "facts")):
        raise ConfigError(f"strategy.name = {name!r}: is no subclass of strategies.rule.Rule with facts")
    return found


def option_fields(rule: type[Rule]) -> dict[str, dataclasses.Field[Any]]:
    """The options of a rule by name."""
    return {field.name: field for field in dataclasses.fields(rule) if field.name not in COMPOSED}


def _composed(rule: type[Rule], center: Center | None, optimizer: ServerOptimizer | None) -> dict[str, Any]:
    wanted = {
        "strategy.robust": center.name if center is not None and center.name != "mean" else "",
        "strategy.server-optimizer": optimizer.name if optimizer and optimizer.name != "none" else "",
    }
    if issubclass(rule, MeanRule):
        given = {"center": center, "optimizer": optimizer}
        return {key: value for key, value in given.items() if value is not None}
    for key, value in wanted.items():
        if value:
            able = ", ".join(n for n, r in RULES.items() if r.facts.mean)
            raise NotApplicable(
                f"{key} = {value!r}: the aggregate of {rule.facts.name} is no mean (able: {able})"
            )
    return {}
