"""The ``[strategy]`` table: which rule, and what it is composed with."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fedlora.config.checks import parse_json, require
from fedlora.config.section import section, snake


@section("strategy.")
class StrategyConfig:
    """The aggregation rule."""

    name: str = "fedavg"
    """One of ``fedlora strategies``."""
    init_a: str = "kaiming"
    """How the first A is made: ``kaiming``, ``orthonormal``, ``miss``; out of the base: ``pissa``, ``olora``;
    out of public examples: ``eva``, ``lora-ga``."""
    init_examples: PositiveInt = 64
    """Public examples (``data.public``) that ``eva`` and ``lora-ga`` look at."""
    options: str = ""
    """JSON object of the rule's own options, for instance ``{"lam": 0.1}``."""
    allocation: str = "all"
    """Layers that a round trains: ``all``, ``random-layers``, transformer blocks drawn anew each round,
    ``sized-layers``, drawn the more often the further they have moved; or ``sized-ranks``, a budget of
    directions over all layers."""
    allocation_options: str = ""
    """JSON object of the allocation's own options, for instance ``{"layers": 2}``, the number of blocks, or
    ``{"ranks": 24}``, that of directions."""
    robust: str = "none"
    """In place of the mean: ``none``, ``median``, ``trimmed-mean``, ``multi-krum``, the last for any rule."""
    trim_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """``trimmed-mean``: share of the clients cut off at each end."""
    krum_malicious: int = 1
    """``multi-krum``: clients that may lie; a round needs 2 f + 3 updates."""
    krum_chosen: int = 0
    """``multi-krum``: updates that are averaged; 0 means all but the malicious."""
    server_optimizer: str = "none"
    """``none``, ``fedavgm`` or ``fedadam``: how the server moves towards the mean."""
    server_learning_rate: PositiveFloat = 1.0
    """Its step size."""
    server_beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Its momentum."""
    server_beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """``fedadam``: decay of the second moment."""
    server_tau: PositiveFloat = 1e-3
    """``fedadam``: adaptivity."""
    max_update_norm: NonNegativeFloat = 0.0
    """Refuse an update whose shipped tensors moved further than this (2-norm); 0 refuses none for it."""
    screening: Literal["auto", "on", "off"] = "auto"
    """Whether a client's weight and way are bounded by the other clients'; ``auto``: in a deployment, but not
    under ``privacy.mode = "client"``, and not in a simulation."""
    largest_share: NonNegativeFloat = 2.0
    """Screening: no client pulls more than so many equal shares; 0 trusts the counts that clients claim."""
    max_relative_norm: NonNegativeFloat = 2.0
    """Screening: an update that moved further than so many medians of its round is refused, 2.5 times as many
    where clients make unequal numbers of steps (``train.local-epochs``, ``client-groups``); 0: none is."""
    diagnostics: bool = True
    """Measure each aggregation (gap, cosine, effective rank, energy lost)."""

    def __post_init__(self) -> None:
        _ = self.option_dict, self.allocation_dict

    @cached_property
    def option_dict(self) -> dict[str, Any]:
        """The decoded options together with ``init_a``."""
        options = {snake(k): v for k, v in parse_json("strategy.options", self.options, dict).items()}
        require("init_a" not in options, "strategy.options", self.options, "init-a is strategy.init-a")
        return {"init_a": self.init_a, **options}

    @cached_property
    def allocation_dict(self) -> dict[str, Any]:
        """The decoded options of the allocation."""
        given = parse_json("strategy.allocation-options", self.allocation_options, dict)
        return {snake(k): v for k, v in given.items()}
