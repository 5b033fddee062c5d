"""DyLoRA's nested training: each step trains the leading directions of an adapter, how many is drawn.

Valipour, Rezagholizadeh, Kobyzev, Ghodsi, "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using
Dynamic Search-Free Low-Rank Adaptation", EACL 2023 (arXiv 2210.07558). In each step, one b for all layers,

    b ~ U{1 .. r},    y = W x + s B[:, :b] A[:b] x

so that an adapter that is cut to a lower rank later keeps what matters most. The scaling stays s at every b,
as it does where a rule cuts (`fedlora.core.factors.resize`), in the paper it is alpha / b.

Rows of A and columns of B from b on are zero while the passes of a step go by, and are put back before the
optimiser moves. Their gradients are zero exactly, each a product with the other factor's zeros, whatever
computes them, and so no share of a clipping norm is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.core.seeding import stream
from fedlora.core.state import Trainable

AXES = {"A": 0, "B": 1}
"""The axis of a factor along its directions."""


class NestedSteps:
    """Steps of one client; without ``train.nested-ranks`` they are left as they are.

    Args:
        trained: its parameters.
        config: says whether.
        steps: of its round.
        seed: its own and its round's.
    """

    def __init__(self, trained: Trainable, config: TrainConfig, steps: int, seed: int) -> None:
        factors = {**trained.frozen, **trained.factors} if config.nested_ranks else {}
        self._values = {name: tensor.detach() for name, tensor in factors.items()}
        self._trained = trained.factors if config.nested_ranks else {}
        rank = min((t.shape[0] for name, t in factors.items() if name.endswith(".A")), default=1)
        self._ranks = iter(drawn_ranks(rank, steps, seed))

    def begin(self) -> None:
        """Before the passes of a step: cut every layer to the leading directions."""
        self._now = next(self._ranks)
        self._aside = SetAside(beyond(self._values, self._now))

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Inside, the passes of a step."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        """After them: put the others back, with a gradient of zero also where noise was added to it."""
        self._aside.put_back()
        zero(beyond({n: p.grad for n, p in self._trained.items() if p.grad is not None}, self._now))


class SetAside:
    """Values that are zero for a while, then put back.

    Args:
        parts: views of them.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = [(part, part.clone()) for part in parts]
        zero(parts)

    def put_back(self) -> None:
        """The values as they were."""
        for part, kept in self._parts:
            part.copy_(kept)


def drawn_ranks(rank: int, steps: int, seed: int) -> list[int]:
    """The number of leading directions in each step of a client's round, 1 to ``rank``."""
    drawn: list[int] = stream(seed, "nested-ranks").integers(1, rank + 1, steps).tolist()
    return drawn


def beyond(tensors: Mapping[str, Tensor], rank: int) -> list[Tensor]:
    """Views of A (r, in) and B (out, r), by the ends of their names, beyond the leading directions."""
    axes = [(tensor, AXES.get(name.rpartition(".")[2], -1)) for name, tensor in tensors.items()]
    return [t.narrow(axis, rank, t.shape[axis] - rank) for t, axis in axes if axis >= 0]


def zero(parts: Sequence[Tensor]) -> None:
    """Set them to zero, in place."""
    for part in parts:
        part.zero_()
