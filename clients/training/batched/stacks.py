"""The clients' factors and heads, each tensor stacked over the cohort.

A rank below the cohort's largest is filled up with zero rows of A, zero columns of B and a zero border of R.
Their gradients are zero exactly, because each is a product with the other factor's zeros; so they stay zero.
Directions at rest, A0 and B0, are filled up likewise, and take part in forward passes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clients.training.batched.members import Member
from fedlora.core.factors import AdapterSet, LoraFactors, Tensors, resize
from fedlora.models import AdaptedModel

OWN_AXES = {"A": (0,), "B": (1,), "R": (0, 1), "A0": (0,), "B0": (1,)}
"""The axes of a factor that are as long as the rank."""
BESIDE = "beside"
"""Between a layer's name and the factor's, of a second adapter that is held."""


class StackedAdapters:
    """Stacked tensors (members, ...) by name: ``<module>.A``, the head's own names, and what stands beside.

    All members have a second adapter beside their own, or none.

    Attributes:
        values: all of them; those that somebody trains require a gradient.
        factors, head: the names of those that somebody trains, in the order of `AdaptedModel.trainable`.
        scaling: (members,) of each module.
    """

    def __init__(self, model: AdaptedModel, members: Sequence[Member]) -> None:
        self.members = members
        like = next(model.module.parameters())
        self.device, self.dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        self._modules = list(model.modules)
        self._head = list(model.initial_head)
        held = {m: {x for member in members for x in member.adapters[m].tensors()} for m in self._modules}
        self._axes = {f"{m}.{x}": OWN_AXES[x] for m in self._modules for x in OWN_AXES if x in held[m]}
        if _in_blocks(members[0]):
            self._axes |= {f"{m}.R": (0,) for m in self._modules}
        self._sizes = {name: [_sizes(member, name) for member in members] for name in self._axes}
        self.values: dict[str, Tensor] = {name: self._stacked(name) for name in self._axes}
        for name in self._head:
            own = [member.head.get(name, model.initial_head[name]) for member in members]
            self.values[name] = torch.stack(own).to(self.device, self.dtype)
        self.values |= self._beside(members)
        self.scaling = {
            module: torch.tensor(
                [m.adapters[module].scaling for m in members], device=self.device, dtype=self.dtype
            )
            for module in self._modules
        }
        self.factors = [name for name in self._axes if any(is_trained(m, name) for m in members)]
        self.head = self._head if any(m.train_head for m in members) else []
        for name in self.trained:
            self.values[name].requires_grad_(True)
        self._holding = {name: self._who_holds(name) for name in self.trained}

    @property
    def trained(self) -> list[str]:
        """The names of all tensors that somebody trains."""
        return [*self.factors, *self.head]

    def holding(self, name: str, active: int) -> Tensor | None:
        """The places, among the first ``active``, of members that do not train a tensor; None if all do."""
        places = [place for place in self._holding[name] if place < active]
        return torch.tensor(places, device=self.device) if places else None  # no step waits for a device

    def trained_by(self, member: Member) -> list[str]:
        """The names of the tensors that one member trains."""
        head = self.head if member.train_head else []
        return [*(name for name in self.factors if is_trained(member, name)), *head]

    def own(self, stacked: Tensor, name: str, place: int) -> Tensor:
        """One member's part of a stacked tensor, without the filling: a view."""
        part = stacked[place]
        for axis in self._axes.get(name, ()):
            part = part.narrow(axis, 0, self._sizes[name][place][axis])
        return part

    def of_rows(self, clients: Tensor, *, by_example: bool) -> Tensors:
        """Each row's own copy of its client's tensors, (rows, ...).

        Args:
            clients: (rows,), whose each row is.
            by_example: the copies of what is trained are leaves, so that each row gets its own gradient;
                else gradients add up in the stacked values.
        """
        rows = {name: tensor.index_select(0, clients) for name, tensor in self.values.items()}
        if by_example:
            rows |= {name: rows[name].detach().requires_grad_(True) for name in self.trained}
        return rows

    def scaled(self, rows: Tensors, clients: Tensor) -> Tensors:
        """The rows with the scaling in B, and what rests beside what trains."""
        whole = dict(rows)
        for m in self._modules:
            if f"{m}.A0" in rows:
                whole[f"{m}.A"] = torch.cat([rows[f"{m}.A"], rows[f"{m}.A0"]], dim=1)
                whole[f"{m}.B"] = torch.cat([rows[f"{m}.B"], rows[f"{m}.B0"]], dim=2)
            whole[f"{m}.B"] = whole[f"{m}.B"] * self.scaling[m].index_select(0, clients).view(-1, 1, 1)
        return whole

    def read(self, place: int) -> tuple[AdapterSet, Tensors]:
        """One member's adapter and head, as `AdaptedModel.read` gives them."""
        member = self.members[place]
        adapters = {
            module: LoraFactors(
                **{x: self._copy(f"{module}.{x}", place) for x in member.adapters[module].tensors()},
                scaling=member.adapters[module].scaling,
            )
            for module in self._modules
        }
        return adapters, {name: self._copy(name, place) for name in self._head}

    def _copy(self, name: str, place: int) -> Tensor:
        return self.own(self.values[name].detach(), name, place).to("cpu", torch.float32, copy=True)

    def _stacked(self, name: str) -> Tensor:
        module, _, letter = name.rpartition(".")
        shape = [max(sizes) for sizes in zip(*self._sizes[name], strict=True)]
        stacked = torch.zeros(len(self.members), *shape, device=self.device, dtype=self.dtype)
        for place, member in enumerate(self.members):
            part = member.adapters[module].tensors().get(letter)
            if part is not None:
                self.own(stacked, name, place).copy_(part)
        return stacked

    def _beside(self, members: Sequence[Member]) -> Tensors:
        """What stands beside each member's adapter, the scaling in B, filled up to the largest rank."""
        held = [member.beside for member in members if member.beside is not None]
        rank = max((next(iter(one.values())).rank for one in held), default=0)
        return {
            f"{module}.{BESIDE}.{x}": torch.stack(
                [resize(one[module], rank, 1.0).tensors()[x] for one in held]
            ).to(self.device, self.dtype)
            for module in self._modules
            if held
            for x in ("A", "B")
        }

    def _who_holds(self, name: str) -> list[int]:
        is_head = name in self._head
        trains = [m.train_head if is_head else is_trained(m, name) for m in self.members]
        return [place for place, does in enumerate(trains) if not does]


def _in_blocks(member: Member) -> bool:
    """Whether there is a core in blocks, (h, b, b), of which a smaller rank has fewer."""
    cores = [adapter.R for adapter in member.adapters.values() if adapter.R is not None]
    return bool(cores) and cores[0].ndim == 3


def _sizes(member: Member, name: str) -> tuple[int, ...]:
    """The shape of one of a member's tensors; without rows or columns of what it does not have."""
    module, _, letter = name.rpartition(".")
    own = member.adapters[module]
    part = own.tensors().get(letter)
    if part is not None:
        return tuple(part.shape)
    return (0, own.in_features) if letter == "A0" else (own.out_features, 0)


def is_trained(member: Member, factor: str) -> bool:
    """Whether a member trains the factor ``<module>.<letter>``."""
    module, _, letter = factor.rpartition(".")
    return letter in member.trained and module in member.modules
