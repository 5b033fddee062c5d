"""Units of example-level privacy that own several examples: people, of whom all is hidden, not one row.

User-level sampling (Charles et al., "Fine-tuning large language models with user-level differential
privacy", arXiv 2407.07737, Algorithm 2): each step draws every unit with probability q = batch_size / units,
takes the mean gradient over the unit's examples, at most so many, and clips that mean to C. However many
examples a unit has, it adds at most C to the sum, so that accounting is that of DP-SGD with units for
examples. Of a unit with more examples than are allowed that many are drawn anew whenever it is.

A unit goes by the number of the first of its examples, so that it is drawn as an example is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clients.training.batches import Indices
from fedlora.core.seeding import stream
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError

CANARY_EXAMPLES = 2
"""Examples that make up an audit's canary, alike, so that clipping them one by one shows."""


class Units:
    """The units of one client's examples.

    Args:
        examples: the data set.
        indices: the client's examples in it.
        most: examples of a unit in a step at most, >= 1.
        rng: draws them where a unit has more.

    Attributes:
        everyone: the first example of each unit, sorted.

    Raises:
        ConfigError: the data set says of no example whose it is.
    """

    def __init__(self, examples: Examples, indices: Indices, most: int, rng: np.random.Generator) -> None:
        if examples.units is None:
            raise ConfigError("privacy.unit-column: the prepared examples do not say whose they are")
        found, first, owner = np.unique(examples.units[indices], return_index=True, return_inverse=True)
        order = np.argsort(owner, kind="stable")
        members = np.split(indices[order], np.cumsum(np.bincount(owner, minlength=len(found)))[:-1])
        self._members = dict(zip(indices[first].tolist(), members, strict=True))
        self._most, self._rng = most, rng
        self.everyone: Indices = np.sort(indices[first])

    def rows(self, drawn: Indices) -> tuple[Indices, Indices]:
        """The examples of drawn units, and for each the place of its unit among those drawn."""
        chosen = [self._of(int(unit)) for unit in drawn]
        rows = np.concatenate([drawn[:0], *chosen])
        return rows, np.repeat(np.arange(len(drawn)), [len(own) for own in chosen])

    def _of(self, unit: int) -> Indices:
        own = self._members[unit]
        return own if len(own) <= self._most else self._rng.choice(own, self._most, replace=False)


def open_units(examples: Examples, indices: Indices, most: int, seed: int) -> Units | None:
    """A client's units in one round; None where ``most`` is 0 and each example is one."""
    return Units(examples, indices, most, stream(seed, "units")) if most else None


def shares(owners: Indices) -> np.ndarray:
    """The share of each example in its unit's mean, float32, shape (examples,).

    >>> shares(np.array([0, 0, 1])).tolist()
    [0.5, 0.5, 1.0]
    """
    weights: np.ndarray = (1 / np.bincount(owners)[owners]).astype(np.float32) if len(owners) else owners
    return weights


def joined(rows: Tensor, owners: Tensor, count: int) -> Tensor:
    """The sum of the rows of each unit: (rows, ...), (rows,) -> (count, ...)."""
    return rows.new_zeros((count, *rows.shape[1:])).index_add_(0, owners, rows)


def join_at(parameters: Sequence[Tensor], owners: Indices, count: int) -> None:
    """Make units' gradients of the examples' that Opacus left at the parameters."""
    for parameter in parameters:
        own = torch.from_numpy(owners).to(parameter.device)
        parameter.grad_sample = joined(parameter.grad_sample, own, count)  # type: ignore[attr-defined]


def as_examples(rows: Sequence[Tensor]) -> tuple[list[Tensor], Indices]:
    """Units' gradients as those of `CANARY_EXAMPLES` examples each, by their shares, and whose each is."""
    parts = [row.repeat_interleave(CANARY_EXAMPLES, dim=0) / CANARY_EXAMPLES for row in rows]
    return parts, np.repeat(np.arange(len(rows[0])), CANARY_EXAMPLES)
