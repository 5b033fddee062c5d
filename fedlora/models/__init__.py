"""The frozen base model and the adapter inside it; `fedlora.models.export` has the adapter as PEFT files.

Importing this package imports transformers (seconds), and what reads or writes PEFT's files imports PEFT
(half a second more): do it where it is needed.
"""

from fedlora.models.adapted import AdaptedModel
from fedlora.models.build import build_model, pick_device
from fedlora.models.card import AdapterCard
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
    "pick_device",
    "resolve_targets",
]
