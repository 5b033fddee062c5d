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
from strategies.mean import MeanRule
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
from strategies.rules.local_only import LocalOnlyRule
from strategies.rules.lora_fair import LoRAFAIRRule
from strategies.rules.rolora import RoLoRARule
from strategies.rules.zero_padding import ZeroPaddingRule
from strategies.server_optimizer import ServerOptimizer

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


def fact_rows() -> list[dict[str, Any]]:
    """One row for each rule: its `Facts` as plain values, and its options with their defaults."""
    rows = []
    for rule in RULES.values():
        row = dataclasses.asdict(rule.facts)
        row |= {key: sorted(row[key]) for key in ("trained", "uploaded")}
        row["client_dp"] = rule.facts.client_dp
        row["options"] = {name: field.default for name, field in option_fields(rule).items()}
        rows.append(row)
    return rows


def deviations() -> dict[str, str]:
    """Where rules differ from their papers, by name; rules that are not known to differ are left out."""
    return {name: rule.facts.deviation for name, rule in RULES.items() if rule.facts.deviation}


def deviations_table() -> str:
    """The table of deviations in ``docs/strategy.md``."""
    rows = [f"| `{name}` | {text} |" for name, text in deviations().items()]
    return "\n".join(["| name | differs from its paper or the authors' code |", "|---|---|", *rows])


def markdown_table() -> str:
    """The README's table of strategies."""
    lines = [
        "| name | method | exact | mixed ranks | base moves | up | down | paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in fact_rows():
        marks = ["yes" if row[key] else "no" for key in ("exact", "mixed_ranks", "updates_base")]
        cells = [f"`{row['name']}`", row["title"], *marks, row["up"], row["down"], row["paper"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
