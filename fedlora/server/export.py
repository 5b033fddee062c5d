"""The adapters that a run leaves behind, in PEFT's form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clients.personal import in_training
from clients.runtime import ClientRuntime
from clients.store import ClientStore
from fedlora.assets.models import BUILT_IN_MODELS
from fedlora.config import ModelConfig, RunConfig
from fedlora.core.adapters import lora_set, resized, tensor_names
from fedlora.core.base_patches import Patch
from fedlora.core.factors import Tensors, as_product
from fedlora.core.intruders import intruders
from fedlora.core.parallel import parallel_map
from fedlora.core.peft_keys import from_peft
from fedlora.core.state import ClientSpec, State
from fedlora.data.image_reader import PRETRAINED, TINY
from fedlora.models import AdapterCard
from fedlora.models.card import absolute
from fedlora.server.build import client_spec
from fedlora.server.model_card import write_beside
from strategies.rule import Rule

MOST_FEATURES = 640
"""Of a layer whose intruders are counted."""


def export(
    path: Path,
    config: RunConfig,
    runtime: ClientRuntime,
    state: State,
    own: Mapping[int, Tensors],
    *,
    average: bool,
    about: Mapping[str, str],
) -> dict[str, Any]:
    """Write ``adapter/``, and ``adapters/client-K/`` for each client whose own tensors are given.

    Args:
        path: the run's directory.
        config: the run.
        runtime: its model and data.
        state: the last one.
        own: partition -> what the client kept to itself, as far as it can be reached.
        average: ``adapter/`` is the mean over clients where they kept something.
        about: facts of the run for the model card.

    Returns:
        What of ``adapter/`` belongs into the result, see `save_adapter`; nothing of other kinds than LoRA.
    """
    for partition, tensors in own.items():
        theirs = model_of(state, tensors, client_spec(config, runtime, partition))
        _save(path / "adapters" / f"client-{partition}", config, runtime, theirs, about, reader=False)
    if own and average:
        state = mean_model(state, own, {p: float(len(runtime.data.indices(p))) for p in own})
    return _save(path / "adapter", config, runtime, state, about)


def export_seconds(
    path: Path,
    config: RunConfig,
    runtime: ClientRuntime,
    rule: Rule,
    state: State,
    second: Mapping[int, Tensors],
    about: Mapping[str, str],
) -> None:
    """Write ``adapters/client-K/`` for these: what a client receives and its second adapter, as one.

    Where weights go by the input no single adapter has them all: at those of their training.
    """
    scaling = config.lora.scaling(config.lora.personal_rank)
    for partition, tensors in second.items():
        beside = in_training(config, from_peft(tensors).lora(scaling))
        patch = Patch({module: as_product(factors) for module, factors in beside.items()})
        client = client_spec(config, runtime, partition)
        received = in_training(config, lora_set(rule.broadcast(state, client).adapters))
        theirs = replace(state, adapters=dict(received), base=(*state.base, patch))
        _save(path / "adapters" / f"client-{partition}", config, runtime, theirs, about, reader=False)


def _save(
    directory: Path,
    config: RunConfig,
    runtime: ClientRuntime,
    state: State,
    about: Mapping[str, str],
    *,
    reader: bool = True,
) -> dict[str, Any]:
    from fedlora.models.export import save_adapter, save_loaded  # and PEFT, at the end of a run

    card = AdapterCard(
        model=_from_anywhere(config.model),
        label_names=tuple(runtime.data.label_names),
        max_length=config.data.max_length,
        seed=config.seed,
        task=config.task,
        assistant_loss=config.data.assistant_loss,
        dpo_beta=config.train.dpo_beta,
    )
    model = runtime.model
    beside = partial(write_beside, config=config, card=card, reader=reader, about=about)
    if config.lora.method != "lora":
        model.load(state.adapters, state.head)
        save_loaded(directory, model, card, beside=beside)
        return {}
    written = save_adapter(
        directory,
        state,
        model.initial_head,
        card,
        model=model,
        beside=beside,
        max_rank=config.max_rank,
    )
    return {"adapter": written}


def counted_intruders(runtime: ClientRuntime, state: State) -> dict[str, int]:
    """Intruder dimensions of the global model, see `fedlora.core.intruders`; nothing where none were counted.

    Layers of more than `MOST_FEATURES` in or out are left out: two decompositions each take long.
    """
    base, specs = runtime.model.base, runtime.model.modules
    names = [n for n, s in specs.items() if max(s.out_features, s.in_features) <= MOST_FEATURES]
    if not names:
        return {}
    found = parallel_map(lambda name: intruders(base.pristine(name), state.product(name)), names)
    return {
        "intruders": sum(one.count for one in found),
        "intruder_candidates": sum(one.top for one in found),
        "intruder_layers": len(found),
    }


def _from_anywhere(model: ModelConfig) -> ModelConfig:
    """The base by a name that leads to it from any working directory."""
    name = model.name if model.name in (*BUILT_IN_MODELS, *PRETRAINED, *TINY) else str(absolute(model.name))
    return replace(model, name=name, adapter="")


def kept_by(store: Path, partitions: Iterable[int], last_round: int, name: str) -> dict[int, Tensors]:
    """What each client that trained keeps under a name, after its last round, in PEFT's spelling.

    Args:
        store: the run's directory among the clients' stores, ``<state-dir>/<run-key>``.
        partitions: whose.
        last_round: the last round that was aggregated.
        name: `clients.store.OWN` or `clients.personal.SECOND`.
    """
    kept = ClientStore(store)
    found = {p: kept.personal(p, name, last_round + 1) for p in sorted(partitions)}
    return {p: tensors for p, tensors in found.items() if tensors is not None}


def model_of(state: State, own: Tensors, client: ClientSpec | None = None) -> State:
    """The global state, at a client's rank and scaling, with its own tensors in their place."""
    mine, adapters = from_peft(own, tensor_names(state.adapters)), state.adapters
    if client is not None:
        adapters = resized(adapters, client.rank, client.scaling)
    return replace(state, adapters=mine.over(adapters), head={**state.head, **mine.head})


def mean_model(state: State, own: Mapping[int, Tensors], weights: Mapping[int, float]) -> State:
    """The global state with the weighted mean of what clients kept: a model for whom nobody trained.

    A tensor that only some clients have is averaged over those.
    """
    mean: Tensors = {}
    for name in sorted({name for tensors in own.values() for name in tensors}):
        having = [p for p in sorted(own) if name in own[p]]
        total = sum(weights[p] for p in having)
        mean[name] = torch.stack([weights[p] / total * own[p][name] for p in having]).sum(dim=0)
    return model_of(state, mean)
