"""Federated LoRA fine-tuning: simulate, deploy, and budget privacy with one Flower app.

The public API; each name is imported when it is first used, so that a ClientApp process stays light.

>>> import fedlora
>>> fedlora.RunConfig().lora.rank
8
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora import data
    from fedlora.config import RunConfig
    from fedlora.errors import ConfigError, FedLoraError, RunFailed
    from fedlora.evaluation.loaded import LoadedAdapter, Prediction
    from fedlora.merge.aggregate import Outcome
    from fedlora.study.library import (
        RoundCallback,
        RunResult,
        StudyResult,
        aggregate,
        compare,
        evaluate,
        load,
        load_run,
        load_study,
        run,
    )

    __version__: str

_HOMES = {
    "RoundCallback": "fedlora.study.library",
    "RunResult": "fedlora.study.library",
    "StudyResult": "fedlora.study.library",
    "aggregate": "fedlora.study.library",
    "compare": "fedlora.study.library",
    "evaluate": "fedlora.study.library",
    "load": "fedlora.study.library",
    "load_run": "fedlora.study.library",
    "load_study": "fedlora.study.library",
    "run": "fedlora.study.library",
    "LoadedAdapter": "fedlora.evaluation.loaded",
    "Prediction": "fedlora.evaluation.loaded",
    "Outcome": "fedlora.merge.aggregate",
    "RunConfig": "fedlora.config",
    "ConfigError": "fedlora.errors",
    "FedLoraError": "fedlora.errors",
    "RunFailed": "fedlora.errors",
}

__all__ = [
    "ConfigError",
    "FedLoraError",
    "LoadedAdapter",
    "Outcome",
    "Prediction",
    "RoundCallback",
    "RunConfig",
    "RunFailed",
    "RunResult",
    "StudyResult",
    "__version__",
    "aggregate",
    "compare",
    "data",
    "evaluate",
    "load",
    "load_run",
    "load_study",
    "run",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("fedlora")
        except metadata.PackageNotFoundError:  # inside a Flower app bundle, which is no installed package
            return "unknown"
    if name == "data":
        return import_module("fedlora.data")
    if name not in _HOMES:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    if _HOMES[name] not in ("fedlora.config", "fedlora.errors"):
        from fedlora.core.code import refuse_hidden

        refuse_hidden()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
