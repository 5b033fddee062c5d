"""The numbers of a study for other programs: ``results.csv``, ``results.parquet``, ``comparisons.csv``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fedlora.server.records import SETS
from fedlora.study.analyse.comparisons import Comparison
from fedlora.study.analyse.results import RESULTS, CellResult
from fedlora.tasks.metrics import ACCURACY, Metric

MEASURED = (
    "accuracy", "accuracy_worst_decile", "accuracy_worst_client", "loss", "examples", "tokens",
    "rmse", "mae", "r2", "pearson", "f1_micro", "f1_macro",
    "majority_accuracy", "bytes_up", "bytes_down", "epsilon", "seconds", "peak_memory_bytes",
    "intruders", "intruder_candidates",
)  # fmt: skip


def write_tables(
    directory: Path,
    results: Sequence[CellResult],
    comparisons: Sequence[Comparison],
    metric: Metric = ACCURACY,
) -> None:
    """One row a run in ``results.*``, one row a comparison in ``comparisons.csv`` if there are any."""
    runs = pa.Table.from_pylist([_run(result, metric) for result in results])
    pa.csv.write_csv(runs, directory / "results.csv")
    pa.parquet.write_table(runs, directory / RESULTS)
    if comparisons:
        pa.csv.write_csv(
            pa.Table.from_pylist([_comparison(found) for found in comparisons]), directory / "comparisons.csv"
        )


def _run(result: CellResult, metric: Metric) -> dict[str, Any]:
    name = metric.name
    by_domain = result.result.get(f"{name}_by_domain") or {}
    by_client = result.result.get("accuracy_by_client") or {}
    sets = result.result.get(SETS) or {}
    return {
        "run": result.label,
        "kind": result.kind,
        "method": result.method,
        "setting": result.setting,
        "strategy": result.config.strategy.name,
        "seed": result.seed,
        "rounds": len(result.rounds),
        "metric": name,
        "standard_error": (result.result.get("standard_errors") or {}).get(name),
        **{key: result.result.get(key) for key in MEASURED},
        **{f"{name} {domain}": score for domain, score in by_domain.items()},
        **{f"{name} on {of}": found[name] for of, found in sets.items()},
        **{f"accuracy client {client}": accuracy for client, accuracy in by_client.items()},
    }


def _comparison(found: Comparison) -> dict[str, Any]:
    return {
        "method": found.method,
        "baseline": found.baseline,
        "setting": found.setting,
        "metric": found.metric.name,
        "by_client": found.by_client,
        "seeds": len(found.differences),
        "wins": found.wins,
        "difference": found.mean.value,
        "low": found.mean.low,
        "high": found.mean.high,
        "p_sign_flip": found.p_value,
        "p_holm": found.p_holm,
        "p_alike": found.p_alike,
        "p_alike_holm": found.p_alike_holm,
        "detectable": found.detectable,
        "verdict": found.verdict,
    }
