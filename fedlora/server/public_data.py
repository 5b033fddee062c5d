"""Statistics of public examples before training: the loss's gradient, the layers' inputs.

For rules that start from a gradient (`Rule.gradient_examples`), for LoRA-GA and EVA. The server computes it
once, before round 1. The examples are those of ``data.public``; for a gradient their labels must be those of
the run. An example that some client holds is never used, so that no client's privacy is touched; nor is one
that the run is tested on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clients.runtime import ClientRuntime
from clients.training.batches import Indices, load_batch
from clients.training.train import batch_loss
from fedlora.config import DataConfig, RunConfig
from fedlora.core.base_patches import Patch
from fedlora.core.factors import Tensors
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.init_eva import InputMoments
from fedlora.core.seeding import stream
from fedlora.data.columns import BUILT_IN
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError, shown_apart
from fedlora.models import AdaptedModel
from fedlora.prepared.cache import Prepared, open_prepared, prepare
from fedlora.tasks.task import inputs

BATCH = 16


def first_gradients(runtime: ClientRuntime, config: RunConfig, number: int) -> Tensors:
    """Module -> (out, in) gradient of the mean loss of ``number`` public examples, at W_0 and the first head.

    Raises:
        ConfigError: labels that are not the run's, or fewer examples that are not the run's own.
    """
    public = open_public(config)
    if public.label_names != runtime.data.label_names:
        its, of_run = shown_apart(public.label_names, runtime.data.label_names)
        raise ConfigError(f"data.public = {config.data.public!r}: its labels are {its}, the run has {of_run}")
    model = _as_before_training(runtime, config)
    total = {name: torch.zeros(m.out_features, m.in_features) for name, m in model.modules.items()}
    with model.base.gradients() as gradients_of:
        for batch in _batches(public, runtime, config, number):
            for name, gradient in gradients_of(batch_loss(model, batch, reduction="sum") / number).items():
                total[name] += gradient
    return total


def first_inputs(runtime: ClientRuntime, config: RunConfig, number: int) -> InputMoments:
    """Inputs of the adapted layers on ``number`` public examples, at W_0; padding is left out.

    Raises:
        ConfigError: fewer examples that are not the run's own.
    """
    model = _as_before_training(runtime, config)
    moments = InputMoments(model.modules)
    with torch.no_grad():
        for batch in _batches(open_public(config), runtime, config, number):
            mask = batch.get("attention_mask")

            def see(name: str, x: Tensor, mask: Tensor | None = mask) -> None:
                tokens = mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape
                moments.add(name, x[mask.bool()] if mask is not None and tokens else x.flatten(0, -2))

            with model.base.watched_inputs(see):
                model.module(**inputs(model.module, batch))
    return moments


def _as_before_training(runtime: ClientRuntime, config: RunConfig) -> AdaptedModel:
    """The model at W_0, with B = 0 and its first head."""
    no_patches: dict[str, Patch] = {}
    runtime.move_to((), no_patches.__getitem__)
    runtime.model.load(fresh_adapters(runtime.model.modules, config.rank_of(0), 1.0, config.seed), {})
    return runtime.model


def _batches(
    public: Prepared, runtime: ClientRuntime, config: RunConfig, number: int
) -> Iterator[dict[str, Tensor]]:
    chosen = _chosen(public, runtime.data, config, number)
    for start in range(0, number, BATCH):
        yield load_batch(
            public.train, chosen[start : start + BATCH], public.pad_token_id, runtime.model.device
        )


def public_data(data: DataConfig) -> DataConfig:
    """The public examples as a data set of their own, read as the clients' data is."""
    public = DataConfig(name=data.public, partitioner="iid", num_partitions=1, max_length=data.max_length)
    if data.public in BUILT_IN:
        return public
    return replace(
        public,
        text_column=data.text_column,
        image_column=data.image_column,
        label_column=data.label_column,
        assistant_loss=data.assistant_loss,
    )


def open_public(config: RunConfig) -> Prepared:
    """The public examples of a run, prepared on first use.

    Raises:
        ConfigError: they cannot be had.
    """
    try:
        plain = replace(config.privacy, unit_column="")  # nobody's secret
        return open_prepared(prepare(replace(config, data=public_data(config.data), privacy=plain)))
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.name", "data.public")) from None


def _chosen(public: Prepared, held: Prepared, config: RunConfig, number: int) -> Indices:
    """Public training examples at random, without those whose tokens stand in the run's own data."""
    known = {_tokens(own, i) for own in (held.train, held.test) for i in range(len(own))}
    order = stream(config.seed, "public").permutation(len(public.train))
    free = np.array([i for i in order if _tokens(public.train, i) not in known][:number], dtype=np.int64)
    if len(free) < number:
        raise ConfigError(
            f"data.public = {config.data.public!r}: has {len(free)} training examples that are not in "
            f"data.name, {number} are needed"
        )
    return free


def _tokens(examples: Examples, index: int) -> bytes:
    return examples.input_ids(index).tobytes()
