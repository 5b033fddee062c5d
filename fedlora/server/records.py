"""The records of ``rounds.jsonl`` and ``result.json``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from clients.evaluation import Evaluation
from clients.execute import ACCURACY_IN, EXAMPLES_IN, NUM_EXAMPLES, NUM_UNITS
from clients.privacy import mechanism_of
from fedlora.config import RunConfig
from fedlora.data.columns import BY_NATURE
from fedlora.data.targets import REGRESSION
from fedlora.errors import RunFailed
from fedlora.prepared.cache import Prepared
from fedlora.privacy.trade_off import curve_of, history_of
from fedlora.tasks import CLASSIFICATION, Task, task_named
from fedlora.tasks.preference import margin
from fedlora.tasks.targets import Regression
from strategies.report import RoundReport

MEASURED = (
    "accuracy", "loss", "accuracy_by_domain", "examples", "perplexity", "perplexity_by_domain", "tokens",
    "margin", "rmse", "rmse_by_domain", "mae", "r2", "pearson", "f1_micro", "f1_micro_by_domain", "f1_macro",
)  # fmt: skip
"""Keys of an evaluation as a record; those after the first four where the task has them."""

SETS = "evaluation_sets"
"""Evaluations on further test examples, by name."""


def summary(outcome: Evaluation, domain_names: Sequence[str], task: Task = CLASSIFICATION) -> dict[str, Any]:
    """An evaluation as a record: accuracy, loss, accuracy by domain, examples.

    Of a language model they are over tokens; there are also perplexity, by domain too, and tokens. Of pairs
    there is the mean margin of rewards. Of targets there is what `fedlora.tasks.targets` measures; regression
    has no accuracy.
    """
    by_domain = {domain_names[d]: results for d, results in outcome.by_domain().items()}
    record = {
        "accuracy": outcome.accuracy,
        "loss": outcome.loss,
        "accuracy_by_domain": {name: results.accuracy for name, results in by_domain.items()},
        "examples": outcome.num_examples,
    }
    if task.unit == "token":
        record["perplexity"] = perplexity(outcome.loss)
        record["perplexity_by_domain"] = {name: perplexity(r.loss) for name, r in by_domain.items()}
        record["tokens"] = outcome.num_units
    if task.unit == "pair":
        record["margin"] = margin(outcome.losses)
    if isinstance(task, Regression) and outcome.outputs is not None and outcome.targets is not None:
        record |= task.measures(outcome.outputs, outcome.targets)
        first = task.metrics[0]
        record[f"{first}_by_domain"] = {
            name: task.measures(r.outputs, r.targets)[first]
            for name, r in by_domain.items()
            if r.outputs is not None and r.targets is not None
        }
    if task.problem_type == REGRESSION:
        record |= {"accuracy": None, "accuracy_by_domain": {}}
    return record


def perplexity(loss: float) -> float | None:
    """The exponential of a mean negative log-likelihood in nats; None where no float holds it."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None


def personal_summary(
    metrics: Mapping[int, Mapping[str, float]], domain_names: Sequence[str], task: Task = CLASSIFICATION
) -> dict[str, Any]:
    """Clients' evaluations of their own models as a record, means over examples (or their tokens)."""
    weights = {p: m.get(NUM_UNITS, m[NUM_EXAMPLES]) for p, m in metrics.items()}
    total = sum(weights.values())
    if total == 0:
        raise RunFailed("no client could be evaluated; a node's max-evaluations says how often it may be")
    by_domain = {}
    for number, name in enumerate(domain_names):
        counted = [m for m in metrics.values() if f"{EXAMPLES_IN}{number}" in m]
        seen = sum(m[f"{EXAMPLES_IN}{number}"] for m in counted)
        if seen:
            right = sum(m[f"{EXAMPLES_IN}{number}"] * m[f"{ACCURACY_IN}{number}"] for m in counted)
            by_domain[name] = right / seen
    loss = sum(weights[p] * m["loss"] for p, m in metrics.items()) / total
    record = {
        "accuracy": sum(weights[p] * m["accuracy"] for p, m in metrics.items()) / total,
        "loss": loss,
        "accuracy_by_domain": by_domain,
        "examples": int(sum(m[NUM_EXAMPLES] for m in metrics.values())),
        BY_CLIENT: {str(p): m["accuracy"] for p, m in sorted(metrics.items())},
    }
    if task.unit == "token":
        record |= {"perplexity": perplexity(loss), "tokens": int(total)}
    return record


def round_record(
    config: RunConfig, report: RoundReport, measured: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """A line of ``rounds.jsonl``.

    Args:
        config: the run.
        report: what happened.
        measured: accuracy and loss, or None for each.
        seconds: since the round before.
    """
    epsilons = {str(p): spent["epsilon"] for p, spent in sorted(report.privacy.items())}
    privacy = mechanism_of(config)
    most = max(report.privacy, key=lambda p: (report.privacy[p]["epsilon"], -p), default=None)
    claim = {} if most is None else {"claim": {"client": most, **_claim(report.privacy[most])}}
    histories = {str(p): found for p in sorted(report.privacy) if (found := _history(report.privacy[p]))}
    return {
        "round": report.server_round,
        "strategy": config.strategy.name,
        **measured,
        "train_loss": report.train_loss if privacy.tells_losses else None,
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "seconds": round(seconds, 3),
        "private": privacy.private,
        "epsilon": max(epsilons.values(), default=None),
        "epsilon_by_client": epsilons,
        **claim,
        **({"history_by_client": histories} if histories else {}),
        **(report.diagnostics.as_dict() if report.diagnostics else {}),
        "participants": report.participants,
        "refused": {str(p): reason for p, reason in report.refused.items()},
        **({"late": {str(p): what for p, what in report.late.items()}} if report.late else {}),
        **({"staleness": {str(p): n for p, n in report.staleness.items()}} if report.staleness else {}),
        **({"halved": report.halved} if report.halved else {}),
        **({} if report.sketch_lost is None else {"sketch_lost": report.sketch_lost}),
        **({} if report.clipping_norm is None else {"clipping_norm": report.clipping_norm}),
    }


def result_record(
    config: RunConfig,
    data: Prepared,
    records: Sequence[Mapping[str, Any]],
    outcome: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """``result.json``: the final evaluation, what it is to be compared with, and totals over the rounds.

    Args:
        config: the run.
        data: what it was tested on.
        records: the lines of ``rounds.jsonl``.
        outcome: accuracy, loss, accuracy by domain, examples.
        before: the same before round 1, where it was measured.
    """
    return {
        "strategy": config.strategy.name,
        "rounds": len(records),
        **outcome,
        **_reference(data, before),
        "epsilon": max((r["epsilon"] for r in records if r["epsilon"] is not None), default=None),
        "epsilon_by_client": {p: e for r in records for p, e in r["epsilon_by_client"].items()},
        **_largest_claim(records),
        **_histories(records),
        "bytes_up": sum(r["bytes_up"] for r in records),
        "bytes_down": sum(r["bytes_down"] for r in records),
        "seconds": round(sum(r["seconds"] for r in records), 3),
        "labels": list(data.label_names),
        **({"left_out": {str(p): why for p, why in data.left_out.items()}} if data.left_out else {}),
        **_reproducible(records),
    }


CLAIM = (
    "epsilon", "delta", "granularity", "neighboring_relation", "sampling_method", "accountant", "steps",
    "on_evaluations", "epsilon_of_model", "epsilon_of_sums", "colluding",
)  # fmt: skip
"""Fields of `fedlora.privacy.types.PrivacySpent` that are kept, beside the history."""


def _claim(spent: Mapping[str, Any]) -> dict[str, Any]:
    """A client's claim, as far as it is one: a number or a short word for each field."""
    kept = {key: value for key in CLAIM if isinstance(value := spent.get(key), int | float | str)}
    kept = {key: value[:40] if isinstance(value, str) else value for key, value in kept.items()}
    return kept | {"history": _history(spent)}


def _history(spent: Mapping[str, Any]) -> list[list[float]]:
    found = history_of(spent)
    return [list(entry) for entry in found] if len(found) <= MOST_SETTINGS else []


def _histories(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The different histories that clients end with; nothing unless all of them are known."""
    last = {p: found for r in records for p, found in r.get("history_by_client", {}).items()}
    if not last or last.keys() != {p for r in records for p in r["epsilon_by_client"]}:
        return {}
    return {"histories": [json.loads(text) for text in sorted({json.dumps(h) for h in last.values()})]}


MOST_SETTINGS = 16
"""Of a recorded history; longer ones say no more, see `fedlora.privacy.trade_off`."""


def _largest_claim(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The claim with the largest epsilon, and what it lets an attacker find; nothing without one."""
    claims = [record["claim"] for record in records if "claim" in record]
    if not claims:
        return {}
    largest = max(claims, key=lambda claim: float(claim["epsilon"]))
    curve = curve_of(largest)
    return {"claim": largest} if curve is None else {"claim": largest, "attacker": curve.record()}


def _reference(data: Prepared, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The share of the commonest label; without labels the model before training; of targets their own."""
    if data.num_labels == 0:
        return {"before": before}
    task = task_named(data.task)
    if isinstance(task, Regression) and data.test.targets is not None:
        return dict(task.baseline(data.test.targets))
    labels = np.bincount(data.test.labels, minlength=data.num_labels)
    return {"majority_accuracy": float(labels.max() / labels.sum())}


def _reproducible(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Reasons that the run cannot be repeated bit for bit; nothing where it can."""
    halved = next((r for r in records if r.get("halved")), None)
    if halved is None:
        return {}
    reason = (
        f"memory ran out in round {halved['round']} at partition {halved['halved'][0]}: it trained in a "
        "smaller cohort than engine.cohort-size"
    )
    return {"reproducible": False, "irreproducible_because": reason}


BY_CLIENT = "accuracy_by_client"


def accuracy_by_client(
    outcome: Evaluation, data: Prepared, partitions: Collection[int], partitioner: str
) -> dict[str, float] | None:
    """Partition id -> accuracy of one model on the test examples of the domains that the client holds.

    A client whose domains have no test example is left out.

    Args:
        outcome: of the model on the whole test set.
        data: who holds which training examples, with the domain of each.
        partitions: the clients.
        partitioner: ``data.partitioner``.

    Returns:
        None where clients have no test examples of their own, or there is no accuracy.
    """
    measured = task_named(data.task).problem_type != REGRESSION
    if not measured or partitioner not in BY_NATURE or not data.domain_names:
        return None
    held = {p: np.unique(data.train.domains[data.indices(p)]) for p in sorted(partitions)}
    if len({domains.tobytes() for domains in held.values()}) == 1:
        return None
    right, units = np.zeros((2, len(data.domain_names)), dtype=np.int64)
    for domain, results in outcome.by_domain().items():
        right[domain], units[domain] = results.right.sum(), results.units.sum()
    sums = {p: (int(right[domains].sum()), int(units[domains].sum())) for p, domains in held.items()}
    return {str(p): hits / count for p, (hits, count) in sums.items() if count} or None


def spread(accuracies: Mapping[str, float] | None) -> dict[str, Any]:
    """Part of a result record: all clients, the mean of the worst tenth, the worst; None where not known."""
    values = list((accuracies or {}).values())
    return {
        BY_CLIENT: accuracies or None,
        "accuracy_worst_decile": worst_decile(values) if values else None,
        "accuracy_worst_client": min(values, default=None),
    }


def worst_decile(accuracies: Sequence[float]) -> float:
    """The mean over the tenth of the clients (rounded up) with the lowest accuracy.

    >>> worst_decile([0.9] * 18 + [0.5, 0.7])
    0.6
    """
    lowest = sorted(accuracies)[: math.ceil(len(accuracies) / 10)]
    return math.fsum(lowest) / len(lowest)
