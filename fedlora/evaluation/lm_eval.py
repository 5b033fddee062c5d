"""``fedlora evaluate --lm-eval``: an exported adapter in EleutherAI's lm-evaluation-harness.

The harness loads the base by transformers and the adapter by PEFT; nothing of fedlora runs in between.
Tried with lm-eval 0.4.13, offline, on tasks of one's own.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fedlora.config import name_list
from fedlora.errors import ConfigError, RunFailed, named_line
from fedlora.models import AdapterCard, pick_device
from fedlora.tasks import task_named

PACKAGE = "lm_eval"


def evaluate_by_harness(adapter: Path, tasks: str, *, limit: int = 0, batch_size: int = 8) -> dict[str, Any]:
    """Metrics of the harness on each task: task -> metric -> value.

    Args:
        adapter: a directory that `save_adapter` wrote, of a language model.
        tasks: comma list of the harness' names and of yaml files that define one.
        limit: examples of each task at most, for a quick look; 0 means all.
        batch_size: examples of a pass.

    Raises:
        ConfigError: no such adapter, no language model, a base without files or of 4 bits, or no harness.
        RunFailed: the harness gave up.
    """
    card = AdapterCard.read(adapter)
    source = card.base_source() if task_named(card.task).network == "language-model" else None
    if source is None:
        raise ConfigError(
            f"--lm-eval {tasks!r}: {adapter} is of {card.model.name!r} for {card.task}, the harness takes "
            "adapters of language models that have files"
        )
    if card.model.quantization != "none":
        raise ConfigError(
            f"--lm-eval {tasks!r}: {adapter} is of a base with model.quantization = "
            f"{card.model.quantization!r}, the harness would measure it on the whole base"
        )
    if not name_list(tasks):
        raise ConfigError(
            f"--lm-eval {tasks!r}: must name tasks of the harness, for instance hellaswag,arc_easy"
        )
    try:
        harness: Any = importlib.import_module(PACKAGE)
    except ImportError:
        raise ConfigError(
            f"--lm-eval {tasks!r}: lm-eval is not installed here (pip install 'lm-eval[hf]')"
        ) from None
    try:
        found = harness.simple_evaluate(
            model="hf",
            model_args={"pretrained": source, "peft": str(adapter), "dtype": "float32"},
            tasks=list(name_list(tasks)),
            batch_size=batch_size,
            device=pick_device("auto").type,
            limit=limit or None,
        )
    except Exception as error:  # whatever a harness of another version or a missing dataset raises
        raise RunFailed(f"--lm-eval {tasks!r}: the harness failed ({named_line(error)})") from error
    measured = {task: _metrics(row) for task, row in found["results"].items()}
    return {task: metrics for task, metrics in measured.items() if metrics}


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """Measured values by ``metric,filter``, without other fields beside them (``name``, ``sample_len``).

    ``acc,none`` is ``acc``: there is no filter. The row of a group without a mean of its own has none.
    """
    return {
        name.removesuffix(",none"): float(value)
        for name, value in row.items()
        if "," in name and isinstance(value, int | float)
    }
