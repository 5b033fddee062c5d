"""Client-level differential privacy: which client took part, and with what data, is hidden in the model.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018
(arXiv 1710.06963), the fixed-denominator estimator; with dX_k what client k's shipped tensors changed:

    X' = X + ( sum_k clip(dX_k, S) + N(0, z^2 S^2) ) / m

Clipping is of all shipped tensors and the head together, to norm S. m is the *planned* cohort: a client that
does not answer is a zero update, so the denominator depends on nobody's data. Everybody weighs alike.

It is central: the server sees every update before the noise, and must be trusted; what is protected is the
model that others receive. Neighbouring runs differ by one client's updates being zero (zero-out). Each round
in which a client takes part costs one Gaussian mechanism of noise z; the sampling amplifies nothing here,
because cohorts have a fixed size and clients know when they took part.

Only for rules whose aggregate is a mean of what is shipped, under equal ranks and scalings: a stack shows
each client's factors, and no noise on a sum covers them. What a rule makes of the noisy mean (an SVD, a
server optimiser) is post-processing and free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedlora.core.adapters import LayerAdapter
from fedlora.core.seeding import torch_stream
from fedlora.core.state import Broadcast, ClientUpdate
from fedlora.errors import ConfigError
from fedlora.privacy.entropy import on_grid, system_normal


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDP:
    """The mechanism.

    Attributes:
        clipping_norm: S, > 0.
        noise_multiplier: z, noise standard deviation of the sum over S.
        seed: of the noise in simulation; None draws it from the operating system.

    Raises:
        ConfigError: a number out of range.
    """

    clipping_norm: float
    noise_multiplier: float
    seed: int | None

    def __post_init__(self) -> None:
        for key in ("clipping_norm", "noise_multiplier"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"privacy.{key.replace('_', '-')} = {value}: must be > 0")

    def now(self, planned: int) -> ClientDP:
        """What clips and noises the next round's sum over so many clients."""
        return self

    def privatise(
        self, updates: Sequence[ClientUpdate], sent: Mapping[int, Broadcast], planned: int, server_round: int
    ) -> list[ClientUpdate]:
        """The updates as one, whose values are the private mean; sum and noise are added in float64.

        The noisy sum lies on a grid (`fedlora.privacy.entropy.on_grid`), so that its last bits do not tell
        which terms it has.

        Args:
            updates: what was received, at least one.
            sent: what each of them started from, by partition.
            planned: clients that were asked, m.
            server_round: names the noise in simulation.
        """
        ordered = sorted(updates, key=lambda update: update.partition_id)
        start = sent[ordered[0].partition_id]
        clipped = [self.clipped(changes(update, sent[update.partition_id])) for update in ordered]
        sums = {name: sum((c[name] for c in clipped[1:]), start=clipped[0][name]) for name in clipped[0]}
        adapters, head = moved(
            start, {name: self._noisy(total, name, server_round) / planned for name, total in sums.items()}
        )
        return [replace(ordered[0], adapters=adapters, head=head, weight=1.0)]

    def clipped(self, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """A change that is at most the clipping norm long."""
        norm = math.sqrt(sum(float(t.square().sum()) for t in changed.values()))
        factor = min(1.0, self.clipping_norm / norm) if norm > 0 else 1.0
        return {name: factor * t for name, t in changed.items()}

    def _noisy(self, total: Tensor, name: str, server_round: int) -> Tensor:
        std = self.noise_multiplier * self.clipping_norm
        if self.seed is None:
            drawn = system_normal(total.shape)
        else:
            generator = torch_stream(self.seed, "client-dp", server_round, name)
            drawn = torch.randn(total.shape, generator=generator, dtype=torch.float64)
        return on_grid(total + std * drawn, std)


def changes(update: ClientUpdate, start: Broadcast) -> dict[str, Tensor]:
    """Updates minus starts in float64, by unique names; zero where nothing is trained."""
    changed = {
        f"{name} {module}": update.adapters[module].tensors()[name].double() - sent.tensors()[name].double()
        for module, sent in start.adapters.items()
        for name in sorted(start.uploaded & sent.tensors().keys())
    }
    return changed | {
        f"head {name}": update.head[name].double() - start.head[name].double() for name in sorted(start.head)
    }


def moved(
    start: Broadcast, changed: Mapping[str, Tensor]
) -> tuple[dict[str, LayerAdapter], dict[str, Tensor]]:
    """Starts plus float64 changes, in the type of the starts."""

    def of(name: str, tensor: Tensor) -> Tensor:
        return (tensor.double() + changed[name]).to(tensor.dtype) if name in changed else tensor

    adapters = {
        module: sent.replaced({name: of(f"{name} {module}", t) for name, t in sent.tensors().items()})
        for module, sent in start.adapters.items()
    }
    return adapters, {name: of(f"head {name}", t) for name, t in start.head.items()}
