"""Weights of a client's two adapters by how like an input is to examples of its own (FedDPA).

Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024 (arXiv 2403.19211);
the released code was read, of the paper the abstract alone. For an input x, and five training examples x_i
of the client's,

    w(x) = 1/2 mean_i cos(h(x), h(x_i)),     y = W x + (1 - w(x)) s B A x + w(x) s_p P Q x

with h(x) the last layer's state of x's last token, in the base with P Q alone. While P and Q are trained both
weights are 1/2.

Here the examples are drawn once for a client, not anew for each input. A negative mean counts as 0. A
classifier's h(x) is what its head reads, which may be a mean over tokens. The part of the released code that
multiplies could not be read: that w goes to P Q, and 1 - w to B A, is the README's and the weights' order.
Nothing of it leaves the client: w is made where the model is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from clients.runtime import ClientRuntime
from clients.training.batches import Indices, load_batch
from fedlora.adapters.lora import InjectedLora
from fedlora.config import RunConfig
from fedlora.core.seeding import stream
from fedlora.data.examples import Examples, cut
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel
from fedlora.models.layers import head_tensors
from fedlora.models.packed_linear import evaluating
from fedlora.tasks.task import Task, inputs

OWN_EXAMPLES = 5
"""Training examples that an input is compared with."""
MOST = 0.5
"""Weight of the second adapter for an input that is like all of them."""
IN_TRAINING = 0.5
"""Weight of either adapter while the second one is trained."""

Weights = np.ndarray[Any, np.dtype[np.float32]]


def has_inputs(task: Task) -> bool:
    """Whether an example is one input and what is predicted of it: texts are no input, pairs are two."""
    return task.labelled or task.name == "instruction"


def input_weights(
    runtime: ClientRuntime, config: RunConfig, partition_id: int, examples: Examples, indices: Indices
) -> Weights:
    """Weight w of the second adapter for each example, in [0, `MOST`].

    Args:
        runtime: its model, with P Q loaded alone, and its data.
        config: the run.
        partition_id: whose.
        examples: the data set of the inputs.
        indices: which of them.
    """
    model, data = runtime.model, runtime.data
    held = data.indices(partition_id)
    draw = stream(config.seed, "own-examples", partition_id)
    own = np.sort(draw.choice(held, min(OWN_EXAMPLES, len(held)), replace=False))
    with evaluating(model, config.evaluation_precision):
        ours, theirs = (
            _states(model, of, chosen, data.pad_token_id)
            for of, chosen in ((data.train, own), (examples, indices))
        )
    similarity = (_unit(theirs) @ _unit(ours).T).mean(dim=1)
    return (MOST * similarity.clamp(min=0.0)).numpy()


def _unit(states: Tensor) -> Tensor:
    return nn.functional.normalize(states, dim=1)


def _states(model: AdaptedModel, examples: Examples, indices: Indices, pad_token_id: int) -> Tensor:
    """States of examples that similarity goes by, (indices, features), float32 on the CPU."""
    found: list[Tensor] = []
    reader = _reader(model.module)

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0].detach())

    places = cut(examples, indices, most_tokens=model.task.most_tokens)
    rows: list[Tensor] = []
    handle = reader.register_forward_pre_hook(keep)
    try:
        with torch.inference_mode():
            for chosen in places:
                batch = load_batch(examples, indices[chosen], pad_token_id, model.device)
                found.clear()
                model.module(**inputs(model.module, batch))
                rows.append(_last(found[0], batch).float().cpu())
    finally:
        handle.remove()
    states = torch.cat(rows)
    return states[torch.from_numpy(np.argsort(np.concatenate(places)))]


def _reader(module: nn.Module) -> nn.Module:
    """The layer that reads an input's states: the head, or a language model's output embedding."""
    head = list(head_tensors(module))
    if head:
        return module.get_submodule(head[0].rpartition(".")[0])
    embedding: nn.Module = module.get_output_embeddings()  # type: ignore[operator]
    return embedding


def _last(states: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """States (rows, features), out of (rows, tokens, features) that of the last token of each input."""
    if states.dim() == 2 or "attention_mask" not in batch:
        return states.flatten(1)
    ends = batch["attention_mask"].sum(dim=1)
    if "counted" in batch:  # what is predicted begins at the first counted token
        counted = batch["counted"].bool()
        ends = torch.where(counted.any(dim=1), counted.int().argmax(dim=1), ends)
    return states[torch.arange(len(states), device=states.device), ends.clamp(min=1) - 1]


@contextmanager
def weighed(model: AdaptedModel, weights: Weights | None) -> Iterator[None]:
    """Inside, a pass of as many rows counts each row's two adapters by its own weights.

    Args:
        model: with a second adapter, and a global one beside it.
        weights: w of each row, of the second adapter; the other counts 1 - w. None: both count whole.

    Raises:
        ConfigError: in a pass, where a layer does not see its input by rows.
    """
    if weights is None:
        yield
        return
    second, adapter = torch.from_numpy(weights).to(model.device), cast(InjectedLora, model.adapter)
    handles = [
        layer.register_forward_hook(_by_row(module, share))
        for module in model.modules
        for layer, share in zip(adapter.outputs(module), (second, 1 - second), strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_row(module: str, shares: Tensor) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if len(output) != len(shares):
            raise ConfigError(f"lora.personal-weights = 'input': {module} does not see its input by rows")
        return output * shares.to(output.dtype).view(-1, *[1] * (output.dim() - 1))

    return hook
