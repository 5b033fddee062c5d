"""The rules by name; tables, tests, refusals and the public classes follow from it.

A rule in a file of ``strategies/rules/`` is listed by being there. One of a user's own is named as
``module:Class`` (see docs/strategy.md) and never takes a listed name.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any

from fedlora.core.code import import_own
from fedlora.errors import OR_YOUR_OWN, ConfigError, NotApplicable, unknown_name
from strategies import rules
from strategies.allocation import Allocation
from strategies.layer import Center
from strategies.mean import MeanRule
from strategies.rule import Rule
from strategies.server_optimizer import ServerOptimizer


def found() -> dict[str, type[Rule]]:
    """The rules in ``strategies/rules/``, in the order of their files' names."""
    listed: dict[str, type[Rule]] = {}
    for file in sorted(iter_modules(rules.__path__), key=lambda file: file.name):
        module = importlib.import_module(f"{rules.__name__}.{file.name}")
        for rule in vars(module).values():
            if isinstance(rule, type) and issubclass(rule, Rule) and rule.__module__ == module.__name__:
                other = listed.setdefault(rule.facts.name, rule)
                assert other is rule, f"{other.__module__} and {rule.__module__} are both {rule.facts.name!r}"
    return listed


RULES: Mapping[str, type[Rule]] = MappingProxyType(found())
"""Name -> rule, in the order of the tables."""
COMPOSED = ("center", "optimizer", "allocation")
"""Fields of rules that are no options of their own: what they are composed with."""


def make_rule(
    name: str | type[Rule],
    options: Mapping[str, Any] | None = None,
    *,
    center: Center | None = None,
    optimizer: ServerOptimizer | None = None,
    allocation: Allocation | None = None,
) -> Rule:
    """The rule of that name, or class, with its options (its fields), composed with what is given.

    Raises:
        NotApplicable: a robust centre or a server optimiser for a rule whose aggregate is no mean, or an
            allocation that it cannot take.
        ConfigError: an unknown name or option, or a value that the rule refuses.

    >>> make_rule("fedsvd", {"period": 2}).period
    2
    """
    rule = rule_type(name) if isinstance(name, str) else name
    fields, called = option_fields(rule), rule.facts.name
    for key, value in (options or {}).items():
        if key not in fields:
            raise ConfigError(
                f"strategy.options {key} = {value!r}: {called} accepts {', '.join(fields) or 'none'}"
            )
        expected = type(fields[key].default)
        if expected is float and type(value) is int:
            continue
        if type(value) is not expected:
            raise ConfigError(f"strategy.options {key} = {value!r}: {called} expects {expected.__name__}")
    composed = _composed(rule, center, optimizer)
    composed |= {} if allocation is None else {"allocation": allocation}
    return rule(**(options or {}), **composed)


def rule_type(name: str) -> type[Rule]:
    """The class behind a name, listed or ``module:Class``; modules are also looked for where one stands.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    if name in RULES:
        return RULES[name]
    if ":" not in name:
        raise unknown_name("strategy.name", name, RULES, OR_YOUR_OWN)
    found = import_own("strategy.name", name)
    if not (isinstance(found, type) and issubclass(found, Rule) and hasattr(found, "facts")):
        raise ConfigError(f"strategy.name = {name!r}: is no subclass of strategies.rule.Rule with facts")
    return found


def option_fields(rule: type[Rule]) -> dict[str, dataclasses.Field[Any]]:
    """The options of a rule by name."""
    return {field.name: field for field in dataclasses.fields(rule) if field.name not in COMPOSED}


def _composed(rule: type[Rule], center: Center | None, optimizer: ServerOptimizer | None) -> dict[str, Any]:
    if center is not None and not issubclass(rule, MeanRule) and (other := center.for_products()):
        return {"center": other, **_composed(rule, None, optimizer)}
    wanted = {
        "strategy.robust": center.name if center is not None and not center.is_mean else "",
        "strategy.server-optimizer": optimizer.name if optimizer and not optimizer.plain else "",
    }
    if issubclass(rule, MeanRule):
        given = {"center": center, "optimizer": optimizer}
        return {key: value for key, value in given.items() if value is not None}
    for key, value in wanted.items():
        if value:
            able = ", ".join(n for n, r in RULES.items() if r.facts.mean)
            raise NotApplicable(
                f"{key} = {value!r}: the aggregate of {rule.facts.name} is no mean (able: {able}"
                f"{'; multi-krum chooses for every rule' if key == 'strategy.robust' else ''})"
            )
    return {}


def fact_rows() -> list[dict[str, Any]]:
    """One row for each rule: its `Facts` as plain values, and its options with their defaults."""
    return [fact_row(rule) for rule in RULES.values()]


def fact_row(rule: type[Rule]) -> dict[str, Any]:
    """The `Facts` of a rule as plain values, and its options with their defaults."""
    row = dataclasses.asdict(rule.facts)
    row |= {key: sorted(row[key]) for key in ("trained", "uploaded")}
    row["client_dp"] = rule.facts.client_dp
    row["options"] = {name: field.default for name, field in option_fields(rule).items()}
    return row


def deviations() -> dict[str, str]:
    """Deviations of rules from their papers, by name; rules that are not known to differ are left out."""
    return {name: rule.facts.deviation for name, rule in RULES.items() if rule.facts.deviation}


def deviations_table() -> str:
    """The table of deviations in ``docs/strategy.md``."""
    rows = [f"| `{name}` | {text} |" for name, text in deviations().items()]
    return "\n".join(["| name | differs from its paper or the authors' code |", "|---|---|", *rows])


def markdown_table() -> str:
    """The table of ``docs/strategies.md``."""
    lines = [
        "| name | method | exact | any kind | mixed ranks | base moves | up | down | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in fact_rows():
        marks = ["yes" if row[key] else "no" for key in ("exact", "any_kind", "mixed_ranks", "updates_base")]
        cells = [f"`{row['name']}`", row["title"], *marks, row["up"], row["down"], row["paper"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
