"""Server optimisers: the clients' mean is a direction to go in, not the place to go to.

With x the tensor before the round, c its mean over the clients and d = c - x:

    FedAvgM (Hsu, Qi, Brown, arXiv 1909.06335):     m <- beta_1 m + d;            x <- x + lr m
    FedAdam (Reddi et al., ICLR 2021, Algorithm 2): m <- beta_1 m + (1 - beta_1) d
                                                    v <- beta_2 v + (1 - beta_2) d^2
                                                    x <- x + lr m / (sqrt(v) + tau)

As in Algorithm 2 there is no bias correction, and v starts at tau^2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.factors import Tensors
from fedlora.errors import ConfigError

SERVER_OPTIMIZERS = ("none", "fedavgm", "fedadam")
FIRST, SECOND = "momentum", "second-moment"
"""Names in a rule's memory: ``momentum/<tensor>``, ``second-moment/<tensor>``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptimizer:
    """Server optimiser: the step towards the mean.

    Attributes:
        name: ``none`` goes there, ``fedavgm`` with momentum, ``fedadam`` with a step per coordinate.
        learning_rate: lr; 1 with fedavgm and beta_1 = 0 is plain averaging.
        beta_1: the momentum.
        beta_2: decay of the second moment.
        tau: fedadam's adaptivity; smaller steps are scaled up less.

    Raises:
        ConfigError: a name or number that is not accepted.
    """

    name: str = "none"
    learning_rate: float = 1.0
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.name not in SERVER_OPTIMIZERS:
            accepted = ", ".join(SERVER_OPTIMIZERS)
            raise ConfigError(f"strategy.server-optimizer = {self.name!r}: accepted are {accepted}")
        for key, low, high in (("beta_1", 0.0, 1.0), ("beta_2", 0.0, 1.0)):
            if not low <= getattr(self, key) < high:
                raise ConfigError(
                    f"strategy.server-{key.replace('_', '-')} = {getattr(self, key)}: must be in [0, 1)"
                )
        for key in ("learning_rate", "tau"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) > 0):
                raise ConfigError(
                    f"strategy.server-{key.replace('_', '-')} = {getattr(self, key)}: must be > 0"
                )

    @property
    def plain(self) -> bool:
        """Whether it goes to the mean itself, and remembers nothing."""
        return self.name == "none"

    @property
    def by_coordinate(self) -> bool:
        """Whether each number is divided by a size of its own, so that a step is not linear in the mean."""
        return self.name == "fedadam"

    @property
    def momentum(self) -> float:
        """Share of a step that goes on in the next one."""
        return 0.0 if self.plain else self.beta_1

    def step(
        self, tensor: str, before: Tensor, center: Tensor, memory: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensors]:
        """The tensor after the round, and what has to be remembered of it."""
        if self.plain:
            return center, {}
        change = center - before
        first = memory.get(f"{FIRST}/{tensor}", torch.zeros_like(change))
        if self.name == "fedavgm":
            first = self.beta_1 * first + change
            return before + self.learning_rate * first, {f"{FIRST}/{tensor}": first}
        second = memory.get(f"{SECOND}/{tensor}", torch.full_like(change, self.tau**2))
        first = self.beta_1 * first + (1 - self.beta_1) * change
        second = self.beta_2 * second + (1 - self.beta_2) * change.square()
        after = before + self.learning_rate * first / (second.sqrt() + self.tau)
        return after, {f"{FIRST}/{tensor}": first, f"{SECOND}/{tensor}": second}


LINEAR = tuple(name for name in SERVER_OPTIMIZERS if not ServerOptimizer(name=name).by_coordinate)
"""Those whose step is linear in the mean, so that it means the same in any basis."""
