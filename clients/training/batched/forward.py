"""Forward-only steps of a cohort, each client's along a perturbation of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clients.training.batched.members import Streams
from clients.training.batched.stacks import StackedAdapters
from clients.training.forward import at_both_sides, keys
from fedlora.core.perturbations import perturbation


class ForwardSteps:
    """What `clients.training.forward.ForwardSteps` does for one client, for all that are still at work.

    Args:
        stacks: what is trained; steps leave the values as they were.
        size: e, the distance to either side along z.
    """

    def __init__(self, stacks: StackedAdapters, size: float) -> None:
        self._stacks, self._size = stacks, size
        self._keys = keys(stacks.factors, stacks.head)
        self._slopes: list[list[Tensor]] = [[] for _ in stacks.members]

    def step(
        self, number: int, streams: Sequence[Streams], losses: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """Gradients g_t z_t of all trained tensors, (active, ...).

        Args:
            number: of the step, from 0.
            streams: of the clients that are at work, a prefix of all.
            losses: mean loss of each one's batch, (active,); it draws from their dropout streams alone.
        """
        stacks, active = self._stacks, len(streams)
        along = {name: self._along(name, number, streams) for name in stacks.trained}
        values = {name: stacks.values[name].detach()[:active] for name in stacks.trained}
        drawn = [stream.dropout.get_state() for stream in streams]
        with torch.no_grad(), at_both_sides(values, along, self._size) as shift:
            shift(1)
            above = losses()
            for stream, state in zip(streams, drawn, strict=True):
                stream.dropout.set_state(state)
            shift(-1)
            below = losses()
        slopes = (above - below) / (2 * self._size)
        for place in range(active):
            self._slopes[place].append(slopes[place])
        return {name: slopes.view(-1, *[1] * (z.ndim - 1)) * z for name, z in along.items()}

    def slopes(self, place: int) -> Tensor | None:
        """(steps,) of one client; None where it took no such step."""
        return torch.stack(self._slopes[place]) if self._slopes[place] else None

    def _along(self, name: str, number: int, streams: Sequence[Streams]) -> Tensor:
        """Each client's part of its perturbation; zeros where it trains nothing, and beyond its rank."""
        stacks = self._stacks
        along = torch.zeros_like(stacks.values[name].detach()[: len(streams)])
        for place, stream in enumerate(streams):
            if name in stacks.trained_by(stacks.members[place]):
                own = stacks.own(along, name, place)
                own.copy_(perturbation(stream.seed, number, self._keys[name], own.shape))
        return along
