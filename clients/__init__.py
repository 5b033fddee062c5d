"""Client side: local training, DP-SGD, evaluation, and what a client keeps between messages.

The names below are for ClientApps and optimisers of other people; each is imported when it is first used,
because a ClientApp is a new process for every message.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clients.mod import base_mod, identify
    from clients.plain_client import own_mod, train_as_ordered, upload_mod
    from clients.training.optimizers.local import Layer, LocalOptimizer

_MODULES = {
    "Layer": "training.optimizers.local",
    "LocalOptimizer": "training.optimizers.local",
    "base_mod": "mod",
    "identify": "mod",
    "own_mod": "plain_client",
    "train_as_ordered": "plain_client",
    "upload_mod": "plain_client",
}

__all__ = ["Layer", "LocalOptimizer", "base_mod", "identify", "own_mod", "train_as_ordered", "upload_mod"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
