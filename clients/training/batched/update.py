"""The optimiser's step for all clients of a cohort at once, on those that still have steps to do.

Members are in the order of their steps, most first, so that those still at work are a prefix ``p[:active]``
of every stacked tensor and all have done the same number of steps. The arithmetic is torch's own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from clients.training.batched.stacks import StackedAdapters, is_trained
from clients.training.train import BETAS, EPS, rates
from fedlora.config import TrainConfig

Gradients = dict[str, Tensor]
"""(active, ...) of every trained tensor that has one."""


class Update:
    """Penalties, clipping and the optimiser.

    Args:
        stacks: what is trained.
        config: of the run.
    """

    def __init__(self, stacks: StackedAdapters, config: TrainConfig) -> None:
        self._stacks = stacks
        self._config = config
        self._start = {name: stacks.values[name].detach().clone() for name in stacks.trained}
        self._moments: dict[str, list[Tensor]] = {}
        self._taken = torch.tensor(0.0)
        self._tails = _Tails(stacks)

    def step(self, gradients: Gradients, active: int) -> None:
        """Move the first ``active`` members; the gradients are changed in place.

        What a member does not train stays as it is, although AdamW would move it even by a zero gradient.
        """
        with torch.no_grad():
            self._leave_alone(gradients, active)
            self._add_penalties(gradients, active)
            if self._config.max_grad_norm > 0:
                clip_by_client(gradients, self._config.max_grad_norm)
            self._leave_alone(gradients, active)
            for names, rate in rates(self._stacks.factors, self._stacks.head, self._config):
                self._move(names, gradients, active, rate)
            self._taken += 1
            self._restore(active)

    def _leave_alone(self, gradients: Gradients, active: int) -> None:
        for name, gradient in gradients.items():
            holding = self._stacks.holding(name, active)
            if holding is not None:
                gradient.index_fill_(0, holding, 0.0)

    def _restore(self, active: int) -> None:
        for name in self._stacks.trained:
            holding = self._stacks.holding(name, active)
            if holding is not None:
                self._stacks.values[name].data.index_copy_(0, holding, self._start[name][holding])

    def _add_penalties(self, gradients: Gradients, active: int) -> None:
        """Those of `clients.training.train.Penalties`, member by member."""
        mu = self._config.proximal_mu
        if mu > 0:
            for name, gradient in gradients.items():
                gradient.add_(self._stacks.values[name][:active] - self._start[name][:active], alpha=mu)
        self._tails.add_gradient(gradients, active)

    def _move(self, names: list[str], gradients: Gradients, active: int, rate: float) -> None:
        config, names = self._config, [name for name in names if name in gradients]
        parameters = [self._stacks.values[name].data[:active] for name in names]
        own = [gradients[name] for name in names]
        if config.optimizer == "sgd":
            self._sgd(names, parameters, own, rate)
            return
        moments = [self._moments_of(name)[i][:active] for i in range(2) for name in names]
        adamw(
            parameters, own, moments[: len(names)], moments[len(names) :], [],
            [self._taken.clone() for _ in names], amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=rate,
            weight_decay=config.weight_decay, eps=EPS, maximize=False,
        )  # fmt: skip

    def _sgd(self, names: list[str], parameters: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        active = len(parameters[0]) if parameters else 0
        buffers: list[Tensor | None] = [
            self._moments[name][0][:active] if name in self._moments else None for name in names
        ]
        sgd(
            parameters, gradients, buffers, weight_decay=self._config.weight_decay,
            momentum=self._config.momentum, lr=rate, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        for name, buffer in zip(names, buffers, strict=True):
            if buffer is not None:
                self._moments.setdefault(name, [buffer])

    def _moments_of(self, name: str) -> list[Tensor]:
        if name not in self._moments:
            start = self._start[name]
            self._moments[name] = [torch.zeros_like(start), torch.zeros_like(start)]
        return self._moments[name]


class _Tails:
    """`clients.training.train.TailGradient` by member: its own weight, first and last rank."""

    def __init__(self, stacks: StackedAdapters) -> None:
        self._stacks = stacks
        members = stacks.members
        if all(member.tail is None for member in members):
            self._pairs: list[tuple[str, str]] = []
            return
        weights = [0.0 if m.tail is None else m.tail.weight for m in members]
        self._weights = torch.tensor(weights, device=stacks.device, dtype=stacks.dtype)
        modules = [name.removesuffix(".A") for name in stacks.factors if name.endswith(".A")]
        self._pairs = [(f"{m}.A", f"{m}.B") for m in modules if f"{m}.B" in stacks.factors]
        ranks = torch.arange(max(member.rank for member in members))
        starts = torch.tensor([m.rank if m.tail is None else m.tail.start for m in members])
        self._inside = (ranks >= starts[:, None]).to(stacks.device, stacks.dtype)
        self._both = {
            a: torch.tensor([float(is_trained(m, a) and is_trained(m, b)) for m in members]).to(self._weights)
            for a, b in self._pairs
        }

    def add_gradient(self, gradients: Mapping[str, Tensor], active: int) -> None:
        for a, b in self._pairs:
            if a not in gradients or b not in gradients:
                continue
            A, B = (self._stacks.values[name].detach()[:active] for name in (a, b))
            inside = self._inside[:active]
            tail_a, tail_b = A * inside[:, :, None], B * inside[:, None, :]
            size_a, size_b = (t.flatten(1).norm(dim=1)[:, None, None] for t in (tail_a, tail_b))
            weight = (self._weights * self._both[a])[:active, None, None]
            gradients[a].add_(weight * size_b * torch.nan_to_num(tail_a / size_a))
            gradients[b].add_(weight * size_a * torch.nan_to_num(tail_b / size_b))


def clip_by_client(gradients: Gradients, max_norm: float) -> None:
    """``torch.nn.utils.clip_grad_norm_`` for each client on its own, in place."""
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()])
    factors = (max_norm / (norms.norm(dim=0) + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))
