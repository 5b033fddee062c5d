"""Evaluations as records, for ``rounds.jsonl`` and ``result.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clients.carry_out import ACCURACY_IN, EXAMPLES_IN, NUM_EXAMPLES
from clients.evaluation import Evaluation
from fedlora.errors import RunFailed


def summary(outcome: Evaluation, domain_names: Sequence[str]) -> dict[str, Any]:
    """An evaluation as a record: accuracy, loss, accuracy by domain, examples."""
    return {
        "accuracy": outcome.accuracy,
        "loss": outcome.loss,
        "accuracy_by_domain": {domain_names[d]: a for d, a in outcome.accuracy_by_domain().items() if d >= 0},
        "examples": outcome.num_examples,
    }


def personal_summary(
    metrics: Mapping[int, Mapping[str, float]], domain_names: Sequence[str]
) -> dict[str, Any]:
    """Clients' evaluations of their own models as a record, means over examples."""
    total = sum(m[NUM_EXAMPLES] for m in metrics.values())
    if total == 0:
        raise RunFailed("no client could be evaluated")
    by_domain = {}
    for number, name in enumerate(domain_names):
        counted = [m for m in metrics.values() if f"{EXAMPLES_IN}{number}" in m]
        seen = sum(m[f"{EXAMPLES_IN}{number}"] for m in counted)
        if seen:
            right = sum(m[f"{EXAMPLES_IN}{number}"] * m[f"{ACCURACY_IN}{number}"] for m in counted)
            by_domain[name] = right / seen
    return {
        "accuracy": sum(m[NUM_EXAMPLES] * m["accuracy"] for m in metrics.values()) / total,
        "loss": sum(m[NUM_EXAMPLES] * m["loss"] for m in metrics.values()) / total,
        "accuracy_by_domain": by_domain,
        "examples": int(total),
        "accuracy_by_client": {str(p): m["accuracy"] for p, m in sorted(metrics.items())},
    }
