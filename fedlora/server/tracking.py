"""Round records for an experiment tracker, through accelerate's trackers; nothing leaves this machine.

    tensorboard   <run>/tracking          tensorboard --logdir runs
    wandb         <run>/wandb, offline    wandb sync <run>/wandb/offline-run-*
    mlflow        <run>/tracking          mlflow ui --backend-store-uri sqlite:///<run>/tracking/mlflow.db
    trackio       its own local database  trackio show

A tracker is a copy of ``rounds.jsonl`` for people who look elsewhere: one that breaks says so once, and the
run goes on without it.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import RunConfig, to_flat
from fedlora.errors import ConfigError, named_line
from fedlora.server.records import SETS

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "fedlora"
TRACKIO_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Environment variables that send what Trackio is told to another machine."""
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "WANDB_SILENT": "true",
}
"""No calls home, and no lines between those of the run."""


def check_tracking(tool: str) -> None:
    """Refuse a tracker that is not there, or that the environment sends elsewhere.

    Raises:
        ConfigError: its package is not installed, or Trackio is told of another machine.
    """
    elsewhere = [name for name in TRACKIO_ELSEWHERE if tool == "trackio" and os.environ.get(name)]
    if elsewhere:
        raise ConfigError(
            f"tracking.tool = 'trackio': {elsewhere[0]} is set, but tracking stays on this machine"
        )
    if tool != "none" and importlib.util.find_spec(tool) is None:
        raise ConfigError(
            f"tracking.tool = {tool!r}: the package {tool} is not installed here (pip install {tool})"
        )


class Tracking:
    """Hands records on to the tracker of a run; to nobody where ``tracking.tool = "none"``.

    Args:
        config: the run.
        path: its directory.
    """

    def __init__(self, config: RunConfig, path: Path) -> None:
        self._tracker: GeneralTracker | None = None
        if config.tracking.tool != "none":
            self._attempt(lambda: self._open(config, path))

    def log_round(self, record: Mapping[str, Any]) -> None:
        """A line of ``rounds.jsonl``."""
        self._log(numbers(record), int(record["round"]))

    def log_result(self, result: Mapping[str, Any]) -> None:
        """The result record, as ``final/...``."""
        self._log({f"final/{name}": value for name, value in numbers(result).items()}, int(result["rounds"]))

    def close(self) -> None:
        """Finish the tracker's run."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            self._attempt(tracker.finish)

    def _open(self, config: RunConfig, path: Path) -> None:
        from accelerate import PartialState

        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        PartialState(cpu=True)  # without it accelerate's trackers cannot write their log lines
        tracker = tracker_of(config.tracking.tool, path)
        tracker.start()
        tracker.store_init_configuration(to_flat(config))
        self._tracker = tracker

    def _log(self, values: dict[str, float], step: int) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._attempt(lambda: tracker.log(values, step=step))

    def _attempt(self, call: Callable[[], None]) -> None:
        """Tells the tracker; an error there ends the tracking, not the run."""
        try:
            call()
        except Exception as error:
            self._tracker = None
            print(f"warning: tracking stopped ({named_line(error)}); the run goes on", file=sys.stderr)


def tracker_of(tool: str, path: Path) -> GeneralTracker:
    """Accelerate's tracker for a run in ``path``, not started; all of them stay on this machine."""
    from accelerate import tracking

    home = path / "tracking"
    if tool == "tensorboard":
        return tracking.TensorBoardTracker(home.name, logging_dir=str(path))
    if tool == "wandb":
        return tracking.WandBTracker(PROJECT, name=path.name, dir=str(path), mode="offline")
    if tool == "trackio":
        return tracking.TrackioTracker(PROJECT, name=path.name)
    import mlflow

    home.mkdir(exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{(home / 'mlflow.db').absolute()}")
    return tracking.MLflowTracker(
        PROJECT, logging_dir=(home / "artifacts").absolute().as_uri(), run_name=path.name
    )


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Plottable values: finite numbers, and those by domain under ``key/domain``.

    >>> numbers({"accuracy": 0.5, "strategy": "ffa", "epsilon": None, "accuracy_by_domain": {"a": 1.0}})
    {'accuracy': 0.5, 'accuracy_by_domain/a': 1.0}
    """
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if key.endswith("_by_domain"):
            flat |= {f"{key}/{domain}": inner for domain, inner in (value or {}).items()}
        elif key == SETS:
            flat |= {f"{name}/{metric}": v for name, of in value.items() for metric, v in of.items()}
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if _finite(value)}


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
