"""What a strategy starts from: the model's shapes out of a PEFT state dict."""

from __future__ import annotations

from flwr.app import ArrayRecord

from fedlora import wire
from fedlora.errors import ConfigError
from fedlora.updates import ModuleSpec, Template


def template_of(arrays: ArrayRecord, scaling: float, init_a: str) -> Template:
    """What a PEFT state dict says of the model; a drawn A is replaced where ``init_a`` asks for it.

    Raises:
        ConfigError: no LoRA factors in it, or modules of unequal rank.
    """
    parts = wire.from_peft(wire.from_record(arrays))
    if not parts.A or set(parts.A) != set(parts.B):
        raise ConfigError(
            "initial_arrays holds no pairs of lora_A and lora_B: pass PEFT's adapter state dict"
        )
    adapters = {name: factors.folded() for name, factors in parts.adapters(scaling).items()}
    ranks = {f.rank for f in adapters.values()}
    if len(ranks) > 1:
        raise ConfigError(f"initial_arrays has ranks {sorted(ranks)}: all modules must have one rank")
    redraw = init_a != "kaiming" and all(not f.B.any() for f in adapters.values())
    return Template(
        modules={
            n: ModuleSpec(out_features=f.out_features, in_features=f.in_features) for n, f in adapters.items()
        },
        rank=ranks.pop(),
        scaling=scaling,
        head=parts.head,
        adapters=None if redraw else adapters,
    )
