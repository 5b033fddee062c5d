"""Directions of an adapter that rest for a round: held apart from those that train, and put back after it.

Direction j of a layer is row j of A and column j of B. With J the directions that train,

    s B A  =  s ( B_J A_J + B0 A0 ),      A0, B0 the rows and columns that are not in J

so that to whoever trains and averages A_J and B_J the others are a part of the base: no optimiser, weight
decay, clipping norm or noise knows of them, and a rule that is exact is exact on what trains.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import inf

from torch import Tensor

from fedlora.core.adapters import Adapters, as_lora, lora_set
from fedlora.core.factors import AdapterSet, LoraFactors

Directions = Mapping[str, Collection[int]]
"""Module -> the directions that train, from 0; a module that is not named trains all it has."""


def parted(factors: LoraFactors, training: Collection[int]) -> LoraFactors:
    """The same delta with all directions but these at rest; those beyond the factors' rank are nobody's.

    >>> import torch
    >>> one = parted(LoraFactors(torch.eye(3), torch.eye(3), 1.0), [2, 0, 7])
    >>> one.rank, one.whole_rank, one.delta().equal(torch.eye(3))
    (2, 3, True)
    """
    moves, rests = _places(factors.rank, training)
    return LoraFactors(
        factors.A[moves], factors.B[:, moves], factors.scaling, A0=factors.A[rests], B0=factors.B[:, rests]
    )


def all_parted(adapters: Adapters, directions: Directions) -> Adapters:
    """`parted` for each layer that is named; the others as they are."""
    return {n: parted(as_lora(a), directions[n]) if n in directions else a for n, a in adapters.items()}


def with_directions(adapters: Adapters) -> frozenset[str]:
    """The layers in which something trains: a client's rank may be below all directions that do."""
    return frozenset(n for n, a in adapters.items() if not (isinstance(a, LoraFactors) and len(a.A) == 0))


def moving(factors: LoraFactors) -> LoraFactors:
    """The directions that train, alone; the same object where none rests."""
    return factors if factors.A0 is None else LoraFactors(factors.A, factors.B, factors.scaling)


def rejoined(whole: LoraFactors, trained: LoraFactors, training: Collection[int]) -> LoraFactors:
    """The whole adapter with what became of some of its directions; the others keep their bits.

    Args:
        whole: before they were trained.
        trained: those directions alone, as many as there are, with the scaling of the whole.
        training: which they are.
    """
    moves, _ = _places(whole.rank, training)
    A, B = whole.A.clone(), whole.B.clone()
    A[moves], B[:, moves] = trained.A, trained.B
    return LoraFactors(A, B, whole.scaling)


def most_changed(start: Adapters, trained: Adapters, count: int) -> AdapterSet:
    """The adapters with so many directions of all layers as they are now, the others as they were.

    Kept are those of the largest ``s || b'_j a'_j - b_j a_j ||_F``, one of the two factors being the same; in
    the order of names where they are equal. What is no number counts as largest, so that it is not hidden.
    """
    begun, done, found = lora_set(start), lora_set(trained), list[tuple[float, str, int]]()
    for name in sorted(begun):
        before, now = begun[name], done[name]
        dB = now.B - before.B
        moved = replace(now, B=dB) if dB.any() else replace(now, A=now.A - before.A)
        found += [(-size, name, j) for j, size in enumerate(sizes(moved).nan_to_num(inf).tolist())]
    kept = {(name, j) for _, name, j in sorted(found)[:count]}
    return {
        name: rejoined(begun[name], parted(f, chosen), chosen)
        for name, f in done.items()
        for chosen in [[j for j in range(f.rank) if (name, j) in kept]]
    }


def count_changed(start: Adapters, now: Adapters) -> int:
    """Directions of all layers whose row of A or column of B is another one than it was."""
    begun, count = lora_set(start), 0
    for name, factors in lora_set(now).items():
        before = begun[name]
        rows, columns = (factors.A != before.A).any(dim=1), (factors.B != before.B).any(dim=0)
        count += int((rows | columns).sum())
    return count


def sizes(factors: LoraFactors) -> Tensor:
    """``s ||b_j|| ||a_j||`` of each direction, (r,) float64: the Frobenius norm of what it adds.

    Where the directions are orthogonal, as after an SVD, these are the singular values of the delta.
    """
    rows, columns = factors.A.double().norm(dim=1), factors.B.double().norm(dim=0)
    found: Tensor = abs(factors.scaling) * rows * columns
    return found


def _places(rank: int, training: Collection[int]) -> tuple[list[int], list[int]]:
    """The directions that train and those that rest, each ascending."""
    chosen = {*training}
    moves = [j for j in range(rank) if j in chosen]
    return moves, [j for j in range(rank) if j not in chosen]
