"""How many examples a pass may have, by what it keeps for its backward pass (``train.pass-memory``).

What autograd keeps is counted, tensor by tensor, for one and for two copies of the client's longest example:
a number that follows from model and data alone, so that the same passes are made on every machine.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from clients.training.batches import Indices, load_batch
from clients.training.reference import reference_batch
from clients.training.train import batch_loss
from fedlora.config import TrainConfig
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel

GIB = 2**30


def with_passes(
    model: AdaptedModel, examples: Examples, indices: Indices, pad_token_id: int, config: TrainConfig
) -> TrainConfig:
    """The same settings with the micro-batch that follows from ``train.pass-memory``, if any.

    Args:
        model: loaded with what is trained.
        examples: the data set.
        indices: the client's examples.
        pad_token_id: fills up shorter sequences.
        config: how the client trains.

    Raises:
        ConfigError: a single example keeps more.
    """
    if not config.pass_memory:
        return config
    lengths, memory = examples.lengths_of(indices), config.pass_memory * GIB
    longest = indices[[int(lengths.argmax())]]
    one, two = (kept_bytes(model, examples, np.repeat(longest, n), pad_token_id) for n in (1, 2))
    if one > memory:
        raise ConfigError(
            f"train.pass-memory = {config.pass_memory:g}: an example of {lengths.max()} tokens alone keeps "
            f"{one / GIB:.3g} GiB, must be at least that"
        )
    return replace(config, micro_batch_size=1 + int((memory - one) // max(1, two - one)))


def kept_bytes(model: AdaptedModel, examples: Examples, indices: Indices, pad_token_id: int) -> int:
    """Bytes that a pass over these examples keeps for its backward pass, weights apart."""
    kept: dict[int, int] = {}
    weights = {t.untyped_storage().data_ptr() for t in (*model.module.parameters(), *model.module.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held.append(tensor)  # so that no two tensors have one address after another
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held: list[Tensor] = []
    pairs = reference_batch(model, model.task, examples, indices, pad_token_id)
    batch = load_batch(pairs, indices, pad_token_id, model.device)
    with (
        torch.random.fork_rng(devices=[]), model.training(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):  # fmt: skip
        batch_loss(model, batch)
    return sum(kept.values())
