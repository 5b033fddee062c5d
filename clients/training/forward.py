"""Forward-only steps: how the loss changes along a drawn vector stands in for the gradient.

Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023 (arXiv 2305.17333),
Algorithm 1; in federations FedKSeed (Qin et al., ICML 2024, arXiv 2312.06353). In step t of a client,

    z_t ~ N(0, I) over all that is trained, from (seed, t)
    g_t = (L(w + e z_t) - L(w - e z_t)) / (2 e)          on the same batch with the same dropout
    gradient := g_t z_t,    E[g_t z_t] -> grad L  for e -> 0

No activation is kept for a backward pass. Penalties, clipping and the optimiser take the gradient as any
other; after plain SGD, g_1 .. g_T and the seed tell all that a round did (`fedlora.wire.seeds`).

FedKSeed has K seeds for all rounds, so that a client can rebuild the model from K numbers; here a client is
sent the adapter, and each step has a perturbation of its own.

Notation of the papers: z, epsilon, g ("projected gradient"; in FedKSeed a scalar gradient) as here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from clients.training.schedule import Stage, rate_factors
from fedlora.config import TrainConfig
from fedlora.core.peft_keys import PREFIX, key_of
from fedlora.core.perturbations import perturbation
from fedlora.core.state import Trainable


def keys(factors: Sequence[str], head: Sequence[str]) -> dict[str, str]:
    """Name of a trained tensor, ``<layer>.A`` or the head's own -> its key in PEFT's spelling."""
    parted = {name: name.rpartition(".") for name in factors}
    return {name: key_of(layer, letter) for name, (layer, _, letter) in parted.items()} | {
        name: PREFIX + name for name in head
    }


class ForwardSteps:
    """Steps of one client; they leave its values as they were, and the gradients in place.

    Args:
        trained: its parameters.
        config: ``perturbation_size`` is e, the distance to either side along z.
        seed: its own and its round's.

    Attributes:
        slopes: g_t of the steps done.
    """

    def __init__(self, trained: Trainable, config: TrainConfig, seed: int) -> None:
        self._size, self._seed = config.perturbation_size, seed
        self._parameters = {**trained.factors, **trained.head}
        self._keys = keys([*trained.factors], [*trained.head])
        self.slopes: list[Tensor] = []

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """The mean of the losses on both sides; ``grad`` of every parameter is g_t z_t.

        Args:
            loss: mean loss of the step's batch, which draws from torch's global stream alone.
        """
        number, device = len(self.slopes), next(iter(self._parameters.values())).device
        along = {
            name: perturbation(self._seed, number, self._keys[name], p.shape).to(p)
            for name, p in self._parameters.items()
        }
        with torch.no_grad(), at_both_sides(self._parameters, along, self._size) as shift:
            shift(1)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                above = loss()
            shift(-1)
            below = loss()
        self.slopes.append((above - below) / (2 * self._size))
        for name, parameter in self._parameters.items():
            parameter.grad = self.slopes[-1] * along[name]
        return (above + below) / 2


@contextmanager
def at_both_sides(
    values: Mapping[str, Tensor], along: Mapping[str, Tensor], size: float
) -> Iterator[Callable[[int], None]]:
    """Inside, ``shift(side)`` moves values to ``w + side size z``; afterwards they have their own bits."""
    own = {name: value.detach().clone() for name, value in values.items()}

    def shift(side: int) -> None:
        for name, value in values.items():
            value.detach().copy_(own[name] + side * size * along[name])

    try:
        yield shift
    finally:
        for name, value in values.items():
            value.detach().copy_(own[name])


def moves(config: TrainConfig, slopes: Tensor, stage: Stage) -> Tensor:
    """How far plain SGD went along each step's perturbation, (steps,): ``- rate_t g_t``."""
    rates = [config.learning_rate * factor for factor in rate_factors(config, len(slopes), stage)]
    return -torch.tensor(rates, dtype=torch.float64) * slopes.double().cpu()
