"""The arrays that leave a strategy (`FactorStrategy.arrays`, Flower's ``Result.arrays``) in a PEFT model.

After a rule that moves the base, an adapter that makes the global model from the pristine base has another
rank in each layer than the clients trained; PEFT's own loader takes no other rank than the model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from flwr.app import ArrayRecord
from peft import PeftModel
from torch import Tensor

from fedlora import wire
from fedlora.models.peft_model import load_any_rank


def load_arrays(model: PeftModel, arrays: ArrayRecord | Mapping[str, Tensor]) -> None:
    """Make a PEFT model the global model, whatever the ranks of the arrays.

    Args:
        model: over the pristine base, made as the clients' model was; changed in place, each layer keeps
            its scaling.
        arrays: of a strategy, or the same as a state dict (``arrays.to_torch_state_dict()``) from a file.

    Raises:
        ConfigError: not a PEFT LoRA model on linear layers, or tensors that it has no place for.
        FactorShapeError: other modules than the model has.
    """
    given = wire.from_record(arrays) if isinstance(arrays, ArrayRecord) else arrays
    load_any_rank(model, {name: torch.as_tensor(tensor) for name, tensor in given.items()})


def save_arrays(model: PeftModel, arrays: ArrayRecord | Mapping[str, Tensor], directory: Path | str) -> None:
    """Write the global model as a directory that ``PeftModel.from_pretrained`` reads; see `load_arrays`."""
    load_arrays(model, arrays)
    model.save_pretrained(str(directory))
