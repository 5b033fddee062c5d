"""The records of ``rounds.jsonl`` and ``result.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clients.carry_out import ACCURACY_IN, EXAMPLES_IN, NUM_EXAMPLES
from clients.evaluation import Evaluation
from fedlora.config import RunConfig
from fedlora.data.prepared import Prepared
from fedlora.errors import RunFailed
from strategies.report import RoundReport


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


def round_record(
    config: RunConfig, report: RoundReport, measured: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """A line of ``rounds.jsonl``.

    Client-level privacy covers the model; losses of clients are outside unless they are released.

    Args:
        config: the run.
        report: what happened.
        measured: accuracy and loss, or None for each.
        seconds: since the round before.
    """
    epsilons = {str(p): spent["epsilon"] for p, spent in sorted(report.privacy.items())}
    told = not config.privacy.client_level or config.privacy.release_metrics
    return {
        "round": report.server_round,
        "strategy": config.strategy.name,
        **measured,
        "train_loss": report.train_loss if told else None,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "seconds": round(seconds, 3),
        "private": config.privacy.mode != "none",
        "epsilon": max(epsilons.values(), default=None),
        "epsilon_by_client": epsilons,
        **(report.diagnostics.as_dict() if report.diagnostics else {}),
        "participants": report.participants,
        "refused": {str(p): reason for p, reason in report.refused.items()},
        **({"halved": report.halved} if report.halved else {}),
    }


def result_record(
    config: RunConfig, data: Prepared, records: Sequence[Mapping[str, Any]], outcome: Mapping[str, Any]
) -> dict[str, Any]:
    """``result.json``: the final evaluation, and totals over the rounds.

    Args:
        config: the run.
        data: what it was tested on.
        records: the lines of ``rounds.jsonl``.
        outcome: accuracy, loss, accuracy by domain, examples.
    """
    labels = np.bincount(data.test.labels, minlength=data.num_labels)
    return {
        "strategy": config.strategy.name,
        "rounds": len(records),
        **outcome,
        "majority_accuracy": float(labels.max() / labels.sum()),
        "epsilon": max((r["epsilon"] for r in records if r["epsilon"] is not None), default=None),
        "epsilon_by_client": {p: e for r in records for p, e in r["epsilon_by_client"].items()},
        "bytes_up": sum(r["bytes_up"] for r in records),
        "bytes_down": sum(r["bytes_down"] for r in records),
        "seconds": round(sum(r["seconds"] for r in records), 3),
        "labels": list(data.label_names),
        **_reproducible(records),
    }


def _reproducible(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Why the run cannot be repeated bit for bit; nothing where it can."""
    halved = next((r for r in records if r.get("halved")), None)
    if halved is None:
        return {}
    reason = (
        f"memory ran out in round {halved['round']} at partition {halved['halved'][0]}: it trained in a "
        "smaller cohort than engine.cohort-size"
    )
    return {"reproducible": False, "irreproducible_because": reason}
