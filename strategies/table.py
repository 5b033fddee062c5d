"""The facts of all rules as rows, for ``fedlora strategies``, the README table and the tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from strategies.registry import RULES, option_fields


def fact_rows() -> list[dict[str, Any]]:
    """One row for each rule: its `Facts` as plain values, and its options with their defaults."""
    rows = []
    for rule in RULES.values():
        row = dataclasses.asdict(rule.facts)
        row |= {key: sorted(row[key]) for key in ("trains", "ships")}
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
        marks = ["yes" if row[key] else "no" for key in ("exact", "mixed_ranks", "moves_base")]
        cells = [f"`{row['name']}`", row["title"], *marks, row["up"], row["down"], row["paper"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
