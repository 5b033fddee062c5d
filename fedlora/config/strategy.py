"""The ``[strategy]`` table: which rule, and what it is composed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedlora.config.checks import parse_json, require, snake


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyConfig:
    """The aggregation rule."""

    name: str = "fedavg"
    """One of ``fedlora strategies``."""
    init_a: str = "kaiming"
    """How the first A is made: ``kaiming``, ``orthonormal``, ``miss``; out of the base: ``pissa``, ``olora``;
    out of public examples: ``eva``, ``lora-ga``."""
    init_examples: int = 64
    """Public examples (``data.public``) that ``eva`` and ``lora-ga`` look at, >= 1."""
    options: str = ""
    """JSON object of the rule's own options, for instance ``{"lam": 0.1}``."""
    robust: str = "none"
    """In place of the mean: ``none``, ``median``, ``trimmed-mean``, ``multi-krum``."""
    trim_fraction: float = 0.2
    """``trimmed-mean``: share of the clients cut off at each end, in [0, 0.5)."""
    krum_malicious: int = 1
    """``multi-krum``: clients that may lie; a round needs 2 f + 3 updates."""
    krum_chosen: int = 0
    """``multi-krum``: updates that are averaged; 0 means all but the malicious."""
    server_optimizer: str = "none"
    """``none``, ``fedavgm`` or ``fedadam``: how the server moves towards the mean."""
    server_learning_rate: float = 1.0
    """Its step size, > 0."""
    server_beta_1: float = 0.9
    """Its momentum, in [0, 1)."""
    server_beta_2: float = 0.99
    """``fedadam``: decay of the second moment, in [0, 1)."""
    server_tau: float = 1e-3
    """``fedadam``: adaptivity, > 0."""
    max_update_norm: float = 0.0
    """Refuse an update whose shipped tensors moved further than this (2-norm); 0 refuses none for it."""
    diagnostics: bool = True
    """Measure each aggregation (gap, cosine, effective rank, energy lost)."""

    def __post_init__(self) -> None:
        _ = self.option_dict
        require(self.init_examples >= 1, "strategy.init-examples", self.init_examples, "must be >= 1")
        require(self.max_update_norm >= 0, "strategy.max-update-norm", self.max_update_norm, "must be >= 0")

    @property
    def option_dict(self) -> dict[str, Any]:
        """The decoded options together with ``init_a``."""
        options = {snake(k): v for k, v in parse_json("strategy.options", self.options, dict).items()}
        require("init_a" not in options, "strategy.options", self.options, "init-a is strategy.init-a")
        return {"init_a": self.init_a, **options}
