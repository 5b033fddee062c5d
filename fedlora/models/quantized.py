"""A base of 4 bits (QLoRA), by bitsandbytes where it is installed.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (arXiv 2305.14314): each
frozen weight is held as NF4, blocks of 64 numbers with one float32 scale, and made whole again where a pass
needs it; LoRA stays in float32. The scales are not quantised once more.

The weights are rounded on the CPU, whatever the device: all clients have the same bits. What is left of a
weight cannot take a patch, so that strategies and starts that move the base are refused
(`fedlora.server.validate`).
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from fedlora.errors import ConfigError
from fedlora.models.layers import linear_layers

KEY = "model.quantization = '4bit'"
BLOCK = 64


class FourBitLinear(nn.Linear):
    """A frozen linear layer; its tensors are plain ones, so that processes can share them.

    Attributes:
        weight: two numbers in each byte, uint8 (out * in / 2, 1).
        scales: the largest magnitude of each block, float32.
        levels: the 16 values of NF4.
    """

    scales: Tensor
    levels: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        packed, state = _functional().quantize_4bit(layer.weight.data, blocksize=BLOCK, quant_type="nf4")
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scales", state.absmax)
        self.register_buffer("levels", state.code)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` of inputs (..., in); the gradient goes to x alone."""
        F: Any = _functional()
        shape = (self.out_features, self.in_features)
        state = F.QuantState(
            absmax=self.scales,
            shape=shape,
            code=self.levels,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=x.dtype,
        )
        y: Tensor = _installed().matmul_4bit(x, self.weight, state, bias=self.bias)
        return y


def quantise(network: nn.Module, name: str) -> None:
    """Put layers of 4 bits in the place of all linear layers of a base, in place; the head stays as it is.

    Raises:
        ConfigError: bitsandbytes is not there, or the base has other layers that would take an adapter, or
            layers whose width is no multiple of the block.
    """
    _installed()
    layers: dict[str, Any] = {layer: network.get_submodule(layer) for layer in linear_layers(network)}
    odd = sorted({type(layer).__name__ for layer in layers.values() if type(layer) is not nn.Linear})
    if odd or not layers:
        raise ConfigError(
            f"{KEY}: {name!r} has layers of type {', '.join(odd) or 'no known kind'}, only nn.Linear can be "
            "held in 4 bits, accepted is 'none'"
        )
    for path, layer in layers.items():
        if layer.in_features % BLOCK:  # bitsandbytes 0.50 unpacks blocks that cross rows wrongly on a CPU
            raise ConfigError(
                f"{KEY}: {path} of {name!r} has {layer.in_features} inputs, must be a multiple of {BLOCK}"
            )
        parent, _, child = path.rpartition(".")
        setattr(network.get_submodule(parent), child, FourBitLinear(layer))


def _installed() -> Any:
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise ConfigError(
            f"{KEY}: bitsandbytes is not installed here (pip install bitsandbytes), accepted is 'none'"
        ) from None


def _functional() -> Any:
    _installed()
    return importlib.import_module("bitsandbytes.functional")
