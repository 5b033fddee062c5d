"""The rules by name: one explicit dictionary, from which tables, tests and refusals are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fedlora.errors import ConfigError
from strategies.fedavg import FedAvgRule
from strategies.fedsvd import FedSVDRule
from strategies.ffa import FFALoRARule
from strategies.flora import FLoRARule
from strategies.head_only import HeadOnlyRule
from strategies.local_only import LocalOnlyRule
from strategies.lora_fair import LoRAFAIRRule
from strategies.rule import Rule

RULES: dict[str, type[Rule]] = {
    rule.facts.name: rule
    for rule in (FedAvgRule, FFALoRARule, FLoRARule, LoRAFAIRRule, FedSVDRule, HeadOnlyRule, LocalOnlyRule)
}


def make_rule(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """The rule of that name with its options (fields of its class).

    Raises:
        ConfigError: an unknown name or option, or a value that the rule refuses.

    >>> make_rule("fedsvd", {"period": 2}).period
    2
    """
    if name not in RULES:
        near = get_close_matches(name, RULES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"strategy.name = {name!r}{hint}: accepted are {', '.join(RULES)}")
    rule = RULES[name]
    fields = {field.name: field for field in dataclasses.fields(rule)}
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
    return rule(**(options or {}))
