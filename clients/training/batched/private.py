"""DP-SGD for a cohort: clip each example over all that its client trains, sum by client, add its noise.

The factors are expanded to one copy for each row, so that the gradient of a copy *is* its example's gradient;
it is small, of the size of the adapter. Both ways of `clients.training.dp_step`, ``hooks`` and ``ghost``,
are this one here. What it computes is asked of `clients.training.batched.self_check` before anything is
trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clients.training.batched.stacks import StackedAdapters
from clients.training.batched.update import Gradients
from clients.training.clip_shares import tensor_clips
from clients.training.dp_mechanism import Mechanism
from clients.training.schedule import NOTHING, rests
from clients.training.units import as_examples, joined
from fedlora.privacy.entropy import on_grid, system_normal


class ClippedSums:
    """The clipped gradients of a step, summed by client while its passes go by.

    Args:
        stacks: what is trained.
        mechanisms: of the members at work, in their order.
        ending: of the names of tensors that rest in this step, see `clients.training.schedule.resting`.

    Attributes:
        sums: the clipped gradients, by client.
        counts: of each client the sum over its rows of 1/2 for a norm within the clipping norm, else -1/2.
    """

    def __init__(
        self, stacks: StackedAdapters, mechanisms: Sequence[Mechanism], ending: str = NOTHING
    ) -> None:
        self._stacks, self._mechanisms = stacks, mechanisms
        values, active = stacks.values, len(mechanisms)
        self.sums = {name: torch.zeros_like(values[name][:active]) for name in stacks.trained}
        members = zip(mechanisms, stacks.members[:active], strict=True)
        clips = [self._clips_of(mechanism, stacks.trained_by(member)) for mechanism, member in members]
        self.counts = torch.zeros(active, device=stacks.device, dtype=stacks.dtype)
        self._clips = torch.tensor(clips, device=stacks.device, dtype=stacks.dtype).T  # (tensors, members)
        self._trained = torch.ones(len(stacks.trained), active, device=stacks.device, dtype=stacks.dtype)
        for row, name in enumerate(stacks.trained):
            holding = stacks.holding(name, active)
            if rests(name, ending):
                self._trained[row] = 0.0
            elif holding is not None:
                self._trained[row].index_fill_(0, holding, 0.0)

    def _clips_of(self, mechanism: Mechanism, trained: Sequence[str]) -> list[float]:
        """To which norm a member's mechanism clips each of the cohort's tensors, or all together."""
        if not self._per_layer:
            return [mechanism.max_grad_norm] * len(self._stacks.trained)
        own = dict(
            zip(trained, tensor_clips(trained, mechanism.max_grad_norm, mechanism.shares), strict=True)
        )
        return [own.get(name, mechanism.max_grad_norm) for name in self._stacks.trained]

    @property
    def _per_layer(self) -> bool:
        return self._mechanisms[0].clipping == "per-layer"

    def add(self, gradients: Mapping[str, Tensor], clients: Tensor) -> None:
        """Add the rows of one pass.

        Args:
            gradients: each row's gradient of each trained tensor, (rows, ...); one of a tensor that the
                row's client does not train counts for nothing.
            clients: (rows,), whose each row is.
        """
        found = [gradients[name] for name in self._stacks.trained]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in found])  # (tensors, rows)
        trained = self._trained[:, clients]  # (tensors, rows)
        # (rows,): such an example counts as zero
        overflowed = ~(norms.isfinite() | (trained == 0)).all(dim=0)
        if overflowed.any():
            norms = norms.masked_fill(overflowed, 0.0)
            found = [g.masked_fill(overflowed.view(-1, *[1] * (g.ndim - 1)), 0.0) for g in found]
        norms = torch.where(trained > 0, norms, torch.zeros_like(norms))
        if not self._per_layer:
            whole = norms.norm(dim=0)  # (rows,): over all tensors together
            self.counts.index_add_(0, clients, (whole <= self._clips[0, clients]).to(self.counts) - 0.5)
            norms = whole.expand_as(norms)
        factors = (self._clips[:, clients] / (norms + 1e-6)).clamp(max=1.0) * trained
        for name, gradient, factor in zip(self._stacks.trained, found, factors, strict=True):
            shape = (-1, *[1] * (gradient.ndim - 1))
            self.sums[name].index_add_(0, clients, gradient * factor.view(shape))

    def released(self, generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """The noisy sums, divided by the expected batch size: all that later steps may know of the data.

        Noise is drawn client by client, for each of its tensors in its own shape, as Opacus draws it there.
        """
        for place, mechanism in enumerate(self._mechanisms):
            for name in self._stacks.trained_by(self._stacks.members[place]):
                part = self._stacks.own(self.sums[name], name, place)
                part.copy_(noisy(part, mechanism, generators[place]) / mechanism.expected_batch_size)
        return self.sums


def noisy(total: Tensor, mechanism: Mechanism, generator: torch.Generator) -> Tensor:
    """``total + N(0, (noise_multiplier C)^2)``; the system's noise is added in float64, rounded to a grid."""
    std = mechanism.noise_multiplier * mechanism.max_grad_norm
    if mechanism.secure:
        drawn = on_grid(total.cpu().double() + std * system_normal(total.shape), std)
        return drawn.to(total.device, total.dtype)
    if std == 0:
        return total
    return total + torch.normal(
        0.0, std, total.shape, generator=generator, dtype=total.dtype, device=total.device
    )


def as_drawn(canaries: Gradients, mechanism: Mechanism) -> Gradients:
    """Canaries as they go into clipping: as they are, or as units whose examples are put together."""
    if not mechanism.unit_examples:
        return canaries
    count = len(next(iter(canaries.values())))
    parts, owners = as_examples(list(canaries.values()))
    own = torch.from_numpy(owners)
    means = [joined(part, own.to(part.device), count) for part in parts]
    return dict(zip(canaries, means, strict=True))
