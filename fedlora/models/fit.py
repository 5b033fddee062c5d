"""What a network and its examples have to fit in: tokens, types, positions, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
