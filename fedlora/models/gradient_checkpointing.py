"""Gradient checkpointing: a pass keeps the inputs of blocks alone, the backward pass computes the rest again.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016 (arXiv 1604.06174), by transformers' own
marks: its models say which of their layers are blocks, and each is computed through torch's checkpoint, which
puts the random state back, so that dropout drops the same. The gradients keep their bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlora.errors import ConfigError


def blocks(network: nn.Module) -> list[Any]:
    """The layers of a model that can be computed again.

    Raises:
        ConfigError: it has none.
    """
    found = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ConfigError(
            f"train.gradient-checkpointing = true: {type(network).__name__} has no blocks that can be "
            "computed again, accepted is false"
        )
    return found


@contextmanager
def recomputed(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, a training pass forgets what is inside of blocks.

    A block heeds the mark in training mode alone. Only its own flag is set: what is inside, dropout above
    all, stays in the mode in which it was. Keys and values are not cached: a second pass would add to them.
    """
    marked: list[Any] = blocks(network) if wanted else []
    config: Any = network.config if marked else None
    before, cached = [block.training for block in marked], getattr(config, "use_cache", None)
    for block in marked:
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        block.gradient_checkpointing = block.training = True
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        for block, training in zip(marked, before, strict=True):
            block.gradient_checkpointing, block.training = False, training
        if cached:
            config.use_cache = cached
