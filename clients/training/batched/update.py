"""Penalties, clipping and the optimiser's step of a cohort, on its members that still have steps to do.

Members are in the order of their steps, most first, so that those still at work are a prefix ``p[:active]``
of every stacked tensor and all have done the same number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from clients.training.batched.stacks import StackedAdapters, is_trained
from clients.training.optimizers.registry import finish, is_stacked, make_optimizer, optimizer_type
from clients.training.schedule import ScheduledRates, Stage, rate_factors
from fedlora.config import TrainConfig
from fedlora.core.state import Trainable

Gradients = dict[str, Tensor]
"""(active, ...) of every trained tensor that has one."""


class Steps(Protocol):
    """The optimiser of a cohort."""

    def step(self, gradients: Gradients, active: int) -> None:
        """Move what the first ``active`` members train, and nothing else."""
        ...

    def finish(self) -> None:
        """Leave what is trained as it is to be read."""
        ...


class Update:
    """Penalties, clipping and the optimiser.

    Args:
        stacks: what is trained.
        config: of the run.
        stage: where the round stands in it.
    """

    def __init__(self, stacks: StackedAdapters, config: TrainConfig, stage: Stage) -> None:
        self._stacks = stacks
        self._config = config
        self._start = {name: stacks.values[name].detach().clone() for name in stacks.trained}
        self._tails = _Tails(stacks)
        self._control = {
            name: torch.stack(
                [m.control.get(name, torch.zeros_like(start[0])).to(start) for m in stacks.members]
            )
            for name, start in self._start.items()
            if any(name in m.control for m in stacks.members)
        }
        rates = [rate_factors(config, member.steps, stage) for member in stacks.members]
        alike = all(own == rates[0][: len(own)] for own in rates)
        if alike and is_stacked(optimizer_type(config.optimizer)):
            self._optimizer: Steps = StackedSteps(stacks, config, rates[0])
        else:
            self._optimizer = MemberSteps(stacks, config, rates)

    def step(self, gradients: Gradients, active: int) -> None:
        """Move the first ``active`` members; the gradients are changed in place."""
        with torch.no_grad():
            self._leave_alone(gradients, active)
            self._add_penalties(gradients, active)
            if self._config.max_grad_norm > 0:
                clip_by_client(gradients, self._config.max_grad_norm)
            self._leave_alone(gradients, active)
            self._optimizer.step(gradients, active)

    def finish(self) -> None:
        """Leave what is trained as it is to be read; no step follows."""
        with torch.no_grad():
            self._optimizer.finish()

    def _leave_alone(self, gradients: Gradients, active: int) -> None:
        for name, gradient in gradients.items():
            holding = self._stacks.holding(name, active)
            if holding is not None:
                gradient.index_fill_(0, holding, 0.0)

    def _add_penalties(self, gradients: Gradients, active: int) -> None:
        """Those of `clients.training.train.Penalties`, member by member."""
        mu = self._config.proximal_mu
        if mu > 0:
            for name, gradient in gradients.items():
                gradient.add_(self._stacks.values[name][:active] - self._start[name][:active], alpha=mu)
        self._tails.add_gradient(gradients, active)
        for name in self._control.keys() & gradients.keys():
            gradients[name].sub_(self._control[name][:active])


class StackedSteps:
    """One optimiser for all members, over the stacked tensors, at the same rates."""

    def __init__(self, stacks: StackedAdapters, config: TrainConfig, rates: Sequence[float]) -> None:
        self._stacks, self._active = stacks, len(stacks.members)
        # share the numbers of the stacks; their .data becomes the prefix of those still at work
        self._moved = {
            name: nn.Parameter(value.detach(), requires_grad=name in stacks.trained)
            for name, value in stacks.values.items()
        }
        self._scaling: dict[str, Tensor] = {m: s.view(-1, 1, 1) for m, s in stacks.scaling.items()}
        held = {name: stacks.holding(name, len(stacks.members)) for name in stacks.trained}
        self._still = {
            name: stacks.values[name].detach().clone() for name, who in held.items() if who is not None
        }
        factors = [name for name in self._moved if name.rpartition(".")[0] in stacks.scaling]
        trained = Trainable(
            factors={name: self._moved[name] for name in stacks.factors},
            head={name: self._moved[name] for name in stacks.head},
            frozen={name: self._moved[name] for name in factors if name not in stacks.factors},
            scaling=self._scaling,
        )
        self._optimizer = make_optimizer(trained, config)
        self._rates = ScheduledRates(self._optimizer, rates)

    def step(self, gradients: Gradients, active: int) -> None:
        """As `Steps`; AdamW moves even by a zero gradient, so what a member does not train is put back."""
        if active < self._active:
            self._narrow(active)
        for name, parameter in self._moved.items():
            parameter.grad = gradients.get(name)
        self._rates.advance()
        self._optimizer.step()
        for name, start in self._still.items():
            holding = self._stacks.holding(name, active)
            if holding is not None:
                self._moved[name].data.index_copy_(0, holding, start[holding])

    def finish(self) -> None:
        """As `Steps`: such optimisers keep nothing apart."""

    def _narrow(self, active: int) -> None:
        """Leave those out who have done their steps."""
        self._active = active
        for parameter in self._moved.values():
            parameter.grad = None
            parameter.data = parameter.data[:active]
        for scaling in self._scaling.values():
            scaling.data = scaling.data[:active]
        for state in self._optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:  # moments; a count of steps is one number
                    state[key] = value[:active]


class MemberSteps:
    """An optimiser for each member, over its own part of the stacked tensors, the filling left out."""

    def __init__(
        self, stacks: StackedAdapters, config: TrainConfig, rates: Sequence[Sequence[float]]
    ) -> None:
        self._stacks = stacks
        self._moved: list[dict[str, nn.Parameter]] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        for place, member in enumerate(stacks.members):
            # some optimisers take flat views, which a part of a larger rank has none of: then a copy
            own = {
                n: nn.Parameter(stacks.own(v.detach(), n, place).contiguous())
                for n, v in stacks.values.items()
            }
            moved = {name: own[name] for name in stacks.trained_by(member)}
            factors = [name for name in own if name.rpartition(".")[0] in stacks.scaling]
            trained = Trainable(
                factors={name: p for name, p in moved.items() if name in stacks.factors},
                head={name: p for name, p in moved.items() if name in stacks.head},
                frozen={name: own[name].requires_grad_(False) for name in factors if name not in moved},
                scaling={module: member.adapters[module].scaling for module in stacks.scaling},
            )
            self._moved.append(moved)
            self._optimizers.append(make_optimizer(trained, config))
        self._rates = [ScheduledRates(o, f) for o, f in zip(self._optimizers, rates, strict=True)]

    def step(self, gradients: Gradients, active: int) -> None:
        """As `Steps`."""
        for place in range(active):
            for name, parameter in self._moved[place].items():
                found = gradients.get(name)
                parameter.grad = None if found is None else self._stacks.own(found, name, place).contiguous()
            self._rates[place].advance()
            self._optimizers[place].step()
            self._give_back(place)

    def finish(self) -> None:
        """As `Steps`."""
        for place, optimizer in enumerate(self._optimizers):
            finish(optimizer)
            self._give_back(place)

    def _give_back(self, place: int) -> None:
        """What was moved, into the stacks, where it is a copy."""
        for name, parameter in self._moved[place].items():
            part = self._stacks.own(self._stacks.values[name].data, name, place)
            if part.data_ptr() != parameter.data_ptr():
                part.copy_(parameter.data)


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
        self._inside = (ranks >= starts[:, None]).to(stacks.device, stacks.dtype)  # (k, r)
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
    factors = (max_norm / (norms.norm(dim=0) + 1e-6)).clamp(max=1.0)  # (clients,); 1e-6 is torch's
    for gradient in gradients.values():
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))
