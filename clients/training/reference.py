"""What the base, from which the run starts, makes of examples that are compared with it (DPO).

The reference is the model itself without its adapter, on the weights W_0 of the beginning whatever patches
came since; so it needs no memory but two numbers for each pair. A client's pairs are always asked for all
together, so that the bits do not depend on what was asked before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from clients.training.batches import Indices, load_batch
from fedlora.data.examples import Examples, cut
from fedlora.models import AdaptedModel
from fedlora.tasks import Task


def with_references(
    model: AdaptedModel, examples: Examples, clients: Sequence[Indices], pad_token_id: int
) -> Examples:
    """The examples; pairs with the log-likelihoods that the base gives to those of some clients.

    Args:
        model: any adapter may be loaded; it stays.
        examples: the data set.
        clients: what each of them holds.
        pad_token_id: fills up shorter sequences.
    """
    if examples.splits is None or examples.reference is not None:
        return examples
    whole = np.zeros((len(examples), 2), dtype=np.float32)
    for indices in filter(len, clients):
        key = f"{id(examples.offsets)} {hashlib.sha256(np.ascontiguousarray(indices).data).hexdigest()}"
        held, found = model.references.get(key, (None, None))
        if found is None or held is not examples.offsets:
            found = _log_likelihoods(model, model.task, examples, indices, pad_token_id)
            model.references[key] = examples.offsets, found  # held, so that no other array takes its id
        whole[indices] = found
    return replace(examples, reference=whole)


def reference_batch(
    model: AdaptedModel | nn.Module, task: Task, examples: Examples, indices: Indices, pad_token_id: int
) -> Examples:
    """As `with_references`, of one batch that is evaluated, and by any PEFT model too; nothing is kept."""
    if examples.splits is None or examples.reference is not None:
        return examples
    whole = np.zeros((len(examples), 2), dtype=np.float32)
    whole[indices] = _log_likelihoods(model, task, examples, indices, pad_token_id)
    return replace(examples, reference=whole)


def _log_likelihoods(
    model: AdaptedModel | nn.Module, task: Any, examples: Examples, indices: Indices, pad_token_id: int
) -> np.ndarray:
    module = model.module if isinstance(model, AdaptedModel) else model
    device = next(module.parameters()).device
    found = np.empty((len(indices), 2), dtype=np.float32)
    none = replace(examples, reference=np.zeros((len(examples), 2), dtype=np.float32))
    with torch.no_grad(), _as_base(model):
        for places in cut(examples, indices, most_tokens=task.most_tokens):
            batch = load_batch(none, indices[places], pad_token_id, device)
            found[places] = task.log_likelihoods(module, batch).float().cpu().numpy()
    return found


@contextmanager
def _as_base(model: Any) -> Iterator[None]:
    with model.as_base() if isinstance(model, AdaptedModel) else model.disable_adapter():
        yield
