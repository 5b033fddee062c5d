"""The frozen base model, the LoRA adapter inside it, and the adapter as PEFT files.

Importing this package imports transformers and PEFT (seconds); do it where a model is needed.
"""

from fedlora.models.adapted import AdaptedModel
from fedlora.models.build import build_model, pick_device
from fedlora.models.card import AdapterCard
from fedlora.models.export import load_adapter, save_adapter, save_loaded
from fedlora.models.fit import check_fit, check_length, check_padding
from fedlora.models.layers import head_tensors, linear_layers, resolve_targets

__all__ = [
    "AdaptedModel",
    "AdapterCard",
    "build_model",
    "check_fit",
    "check_length",
    "check_padding",
    "head_tensors",
    "linear_layers",
    "load_adapter",
    "pick_device",
    "resolve_targets",
    "save_adapter",
    "save_loaded",
]
