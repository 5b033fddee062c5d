"""What a client trains of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedlora.updates import TailPenalty


@dataclass(frozen=True, slots=True)
class Trainable:
    """The parameters that a client trains; ``query.A`` is the factor A of ``query``."""

    factors: dict[str, nn.Parameter]
    head: dict[str, nn.Parameter]
    tail: TailPenalty | None = None

    @property
    def all(self) -> list[nn.Parameter]:
        return [*self.factors.values(), *self.head.values()]
