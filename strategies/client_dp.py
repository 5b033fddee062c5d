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
from fedlora.privacy.entropy import system_normal

ABSENT = -1
"""Partition id of the clients that did not answer, as one zero update."""


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

    def privatise(
        self, updates: Sequence[ClientUpdate], sent: Mapping[int, Broadcast], planned: int, server_round: int
    ) -> list[ClientUpdate]:
        """Updates whose plain mean is the private one: clipped, equally weighted, the noise on the first.

        Args:
            updates: what was received, at least one.
            sent: what each of them started from, by partition.
            planned: clients that were asked, m.
            server_round: names the noise in simulation.
        """
        ordered = sorted(updates, key=lambda update: update.partition_id)
        clipped = [self._clipped(update, sent[update.partition_id]) for update in ordered]
        start = sent[ordered[0].partition_id]
        noisy = [_moved(start, _changes(clipped[0], start), self._noise(clipped[0], start, server_round))]
        private = [replace(clipped[0], adapters=noisy[0][0], head=noisy[0][1]), *clipped[1:]]
        absent = planned - len(private)
        if absent > 0:
            private.append(_still(start, absent))
        return private

    def _clipped(self, update: ClientUpdate, start: Broadcast) -> ClientUpdate:
        changes = _changes(update, start)
        norm = math.sqrt(sum(float(t.double().square().sum()) for t in changes.values()))
        factor = min(1.0, self.clipping_norm / norm) if norm > 0 else 1.0
        adapters, head = _moved(start, {name: factor * t for name, t in changes.items()})
        return replace(update, adapters=adapters, head=head, weight=1.0)

    def _noise(self, update: ClientUpdate, start: Broadcast, server_round: int) -> dict[str, Tensor]:
        std = self.noise_multiplier * self.clipping_norm
        noise = {}
        for name, tensor in _changes(update, start).items():
            if self.seed is None:
                drawn = system_normal(tensor.shape)
            else:
                generator = torch_stream(self.seed, "client-dp", server_round, name)
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            noise[name] = (std * drawn).to(tensor.dtype)
        return noise


def _changes(update: ClientUpdate, start: Broadcast) -> dict[str, Tensor]:
    """What came back minus what was sent, by a unique name; zero where nothing is trained."""
    changes = {
        f"{name} {module}": update.adapters[module].tensors()[name] - sent.tensors()[name]
        for module, sent in start.adapters.items()
        for name in sorted(start.uploaded & sent.tensors().keys())
    }
    return changes | {f"head {name}": update.head[name] - start.head[name] for name in sorted(start.head)}


def _moved(
    start: Broadcast, *changes: Mapping[str, Tensor]
) -> tuple[dict[str, LayerAdapter], dict[str, Tensor]]:
    """What was sent, plus the given changes."""

    def of(name: str, tensor: Tensor) -> Tensor:
        return sum((change[name] for change in changes if name in change), start=tensor)

    adapters = {
        module: sent.replaced({name: of(f"{name} {module}", t) for name, t in sent.tensors().items()})
        for module, sent in start.adapters.items()
    }
    return adapters, {name: of(f"head {name}", t) for name, t in start.head.items()}


def _still(start: Broadcast, count: int) -> ClientUpdate:
    return ClientUpdate(
        partition_id=ABSENT, adapters=start.adapters, head=dict(start.head), weight=float(count)
    )
