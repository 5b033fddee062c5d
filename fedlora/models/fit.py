"""Fit of a network and its examples: tokens, types, positions, padding.

Asked where the model meets its data, before anything is charged or started: in a training pass the same would
be an IndexError of every client.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.config import ModelConfig
from fedlora.data.examples import Examples, collate
from fedlora.errors import ConfigError, named_line
from fedlora.models.layers import in_half_precision
from fedlora.prepared.cache import Prepared
from fedlora.tasks import CLASSIFICATION, Task, task_named
from fedlora.tasks.task import inputs, takes_types

PROBED = 2e11
"""Tokens times parameters of a trial pass at most: seconds on a processor."""
FELT = 1e-3
"""How far logits may move with padding, relative to the largest."""
FELT_IN_HALF = 0.05
"""Likewise of a base in half precision, whose rounding is some hundredths."""


def check_fit(config: ModelConfig, network: nn.Module, data: Prepared, max_length: int) -> None:
    """Refuse examples that the network has no place for; images always have one.

    Args:
        config: names the model in a refusal.
        network: from `fedlora.models.build_model`, on the CPU.
        data: prepared for it.
        max_length: ``data.max-length``.

    Raises:
        ConfigError: a token, type or padding token without an embedding, more tokens than positions, a head
            that looks for other padding or for end tokens that are not there, or a pass that fails.
    """
    task = task_named(data.task)
    if data.train.image is not None or data.test.image is not None:
        return
    where = f"model.name = {config.name!r}"
    check_length(config.name, network, max_length)
    _check_padding_token(where, network, data.pad_token_id)
    if task.network == CLASSIFICATION.network:
        check_padding(config, network, data.pad_token_id)
    for examples in (data.train, data.test):
        if len(examples):
            _check_numbers(where, network, examples)
            if task.network == CLASSIFICATION.network:
                _check_ends(where, network, examples)
    part = data.train if len(data.train) else data.test
    if len(part) and config.quantization == "none":
        _try(where, network, part, data.pad_token_id, task)


def check_padding(config: ModelConfig, network: nn.Module, pad_token_id: int) -> None:
    """Refuse a head of the model's own that takes another token for padding than batches are filled with.

    Decoders' heads look for the last token before the padding, and would read a wrong one.

    Raises:
        ConfigError: the two tokens differ.
    """
    model: Any = network
    if config.pooling == "model" and model.config.pad_token_id != pad_token_id:
        raise ConfigError(
            f"model.name = {config.name!r}: its config.json has pad_token_id = {model.config.pad_token_id}, "
            f'its tokenizer pads with {pad_token_id}; make them equal or use model.pooling = "mean"'
        )


def check_length(name: str, network: nn.Module, max_length: int) -> None:
    """Refuse sequences that are longer than the model has positions for.

    Raises:
        ConfigError: they are.
    """
    most = most_positions(network)
    if most is not None and max_length > most:
        raise ConfigError(f"data.max-length = {max_length}: {name!r} takes at most {most} tokens")


def most_positions(network: Any) -> int | None:
    """Tokens that a model has positions for; None where they are relative (T5, XLNet).

    RoBERTa and its kin count positions from the padding token's number on.
    """
    limits = [getattr(network.config.get_text_config(), "max_position_embeddings", None)]
    limits += [
        table.num_embeddings - table.padding_idx - 1
        for name, table in network.named_modules()
        if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None
    ]
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


def pad_in_front(network: nn.Module) -> None:
    """Have a transformer see each row with its padding in front, in place: its head reads the last position.

    XLNet's does (``summary_type = "last"``), and its tokenizer pads on the left; rows that are padded so
    already stay. Positions are relative there, so that an example is computed as it is without padding.
    """
    network.register_forward_pre_hook(_turned, with_kwargs=True)


def _turned(network: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    mask = named.get("attention_mask")
    if mask is None:
        return given, named
    order = torch.argsort(mask, dim=1, stable=True)  # the padding's zeros first, the tokens in their order

    def turn(value: Any) -> Any:
        return value.gather(1, order) if isinstance(value, Tensor) and value.shape == mask.shape else value

    return tuple(map(turn, given)), {name: turn(value) for name, value in named.items()}


def _embeddings(network: Any) -> int:
    """Rows of the token embedding."""
    model = getattr(network, "backbone", network)
    return int(model.get_input_embeddings().weight.shape[0])


def _check_padding_token(where: str, network: nn.Module, pad_token_id: int) -> None:
    rows = _embeddings(network)
    if not 0 <= pad_token_id < rows:
        raise ConfigError(
            f"{where}: its tokenizer pads with token {pad_token_id}, the model has tokens 0 to {rows - 1}; "
            "give the tokenizer a padding token among these (pad_token in tokenizer_config.json, say its end "
            "token)"
        )


def _check_numbers(where: str, network: nn.Module, examples: Examples) -> None:
    rows, highest = _embeddings(network), int(examples.tokens.max())
    if highest >= rows:
        raise ConfigError(
            f"{where}: its tokenizer makes token {highest} of the data, the model has tokens 0 to "
            f"{rows - 1}; the tokenizer is of another model, or has tokens that were added later"
        )
    if examples.types is not None and takes_types(network):
        config: Any = network.config
        kinds, highest = getattr(config, "type_vocab_size", 256), int(examples.types.max())
        if highest >= kinds:
            raise ConfigError(
                f"{where}: its tokenizer makes token type {highest} of the data, the model has types 0 to "
                f"{kinds - 1}; the tokenizer is of another model"
            )


def _check_ends(where: str, network: nn.Module, examples: Examples) -> None:
    """Refuse where an encoder-decoder, which classifies by the end token, cannot find it as it needs to."""
    config: Any = network.config
    if not getattr(config, "is_encoder_decoder", False):
        return
    ends = np.add.reduceat(examples.tokens == config.eos_token_id, examples.offsets[:-1], dtype=np.int64)
    if not ends.min() or ends.min() != ends.max():
        raise ConfigError(
            f"{where}: classifies by its end token {config.eos_token_id}, of which all examples must have as "
            f"many; some have {ends.min()}, some {ends.max()} (does a text spell it out?)"
        )


def _try(where: str, network: nn.Module, examples: Examples, pad_token_id: int, task: Task) -> None:
    """One pass over the longest example that can be tried quickly, and one with the shortest beside it."""
    numbers = sum(parameter.numel() for parameter in network.parameters())
    lengths = examples.lengths
    shortest, longest = int(lengths.argmin()), int(np.where(lengths * numbers <= PROBED, lengths, 0).argmax())
    try:
        alone = _logits(network, examples, [shortest], pad_token_id)
        both = _logits(network, examples, [shortest, longest], pad_token_id)
    except Exception as error:  # of somebody's network, over what no check above knows
        raise ConfigError(
            f"{where}: fails on an example of {lengths[longest]} tokens ({named_line(error)}); nothing was "
            "started"
        ) from None
    beside = both[:1] if task.labelled else both[:1, : alone.shape[1]]
    moved, size = float((beside - alone).abs().max()), float(alone.abs().max())
    if not moved <= (FELT_IN_HALF if in_half_precision(network) else FELT) * size:
        warnings.warn(
            f"{where}: padding moves its results (logits by {moved:.2g} of {size:.2g}), what it makes of "
            "an example depends on its batch",
            stacklevel=2,
        )


def _logits(network: nn.Module, examples: Examples, chosen: list[int], pad_token_id: int) -> Tensor:
    with torch.no_grad():
        batch = collate(examples, chosen, pad_token_id)
        logits: Tensor = network(**inputs(network, batch)).logits
    return logits
