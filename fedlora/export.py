"""The adapters that a run leaves behind, in PEFT's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from clients.resident import Resident
from fedlora.assembly import client_spec
from fedlora.built_in import BUILT_IN_MODELS
from fedlora.config import ModelConfig, RunConfig
from fedlora.factors import Tensors
from fedlora.models import AdapterCard, save_adapter
from fedlora.models.same_base import absolute
from fedlora.personal import mean_model, model_of
from fedlora.updates import State
from fedlora.vision.backbones import PRETRAINED, TINY


def export(
    path: Path,
    config: RunConfig,
    worker: Resident,
    state: State,
    own: Mapping[int, Tensors],
    *,
    average: bool,
) -> None:
    """Write ``adapter/``, and ``adapters/client-K/`` for each client whose own tensors are given.

    Args:
        path: the run's directory.
        config: the run.
        worker: its model and data.
        state: the last one.
        own: partition -> what the client kept to itself, as far as it can be reached.
        average: ``adapter/`` is the mean over clients where they kept something.
    """
    for partition, tensors in own.items():
        theirs = model_of(state, tensors, client_spec(config, worker, partition))
        _save(path / "adapters" / f"client-{partition}", config, worker, theirs)
    if own and average:
        state = mean_model(state, own, {p: float(len(worker.data.indices(p))) for p in own})
    _save(path / "adapter", config, worker, state)


def _save(directory: Path, config: RunConfig, worker: Resident, state: State) -> None:
    card = AdapterCard(
        model=_from_anywhere(config.model),
        label_names=tuple(worker.data.label_names),
        max_length=config.data.max_length,
        seed=config.seed,
        task=config.task,
        assistant_loss=config.data.assistant_loss,
    )
    model = worker.model
    save_adapter(directory, state, model.initial_head, card, fan_in_fan_out=model.fan_in_fan_out)


def _from_anywhere(model: ModelConfig) -> ModelConfig:
    """The base by a name that leads to it from any working directory."""
    if model.name in (*BUILT_IN_MODELS, *PRETRAINED, *TINY):
        return model
    return replace(model, name=str(absolute(model.name)))
