"""Clipping norm of each trained tensor where tensors are clipped one by one.

A tensor t is clipped to C_t with sum_t C_t^2 = C^2, so that an example moves all by at most C, and noise of
z C on every tensor costs what flat clipping costs. A group of tensors with the share s_g of the budget has
sum_{t in g} C_t^2 = s_g C^2: seen alone it is a Gaussian mechanism of noise multiplier z / sqrt(s_g), and

    sum_g 1 / z_g^2 = sum_g s_g / z^2 = 1 / z^2

Group-wise clipping: McMahan et al., ICLR 2018, section 3; He et al., "Exploring the limits of differentially
private deep learning with group-wise clipping", ICLR 2023.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from fedlora.errors import ConfigError

FACTORS, HEAD, REST = ("A", "B", "R"), "head", "rest"
Shares = tuple[tuple[str, float], ...]
"""Names of groups and their shares, in the order in which a tensor looks for its own."""


def tensor_clips(names: Sequence[str], clip: float, shares: Shares = ()) -> list[float]:
    """C_t of each tensor, in their order; without shares C / sqrt(tensors).

    Shares are scaled to 1 over the groups that have a tensor; within a group its tensors are alike.

    >>> tensor_clips(["query.A", "query.B", "head.weight"], 1.0, (("B", 2.0), ("rest", 2.0)))
    [0.5, 0.7071067811865476, 0.5]

    Raises:
        ConfigError: a tensor that is in no group.
    """
    if not shares:
        return [clip / math.sqrt(len(names))] * len(names)
    groups = [group_of(name, shares) for name in names]
    sizes, given = Counter(groups), dict(shares)
    total = sum(given[group] for group in sizes)
    return [clip * math.sqrt(given[group] / sizes[group] / total) for group in groups]


def group_of(name: str, shares: Shares) -> str:
    """The first group that a tensor is in: its factor, the head, a part of its layer's name, or the rest.

    Raises:
        ConfigError: there is none.
    """
    layer, _, letter = name.rpartition(".")
    kind = letter if letter in FACTORS else HEAD
    for group, _ in shares:
        if group in (kind, REST) or (kind != HEAD and f".{group}." in f".{layer}."):
            return group
    raise ConfigError(f"privacy.clip-shares: {name} is in no group of it, add {REST!r}")
