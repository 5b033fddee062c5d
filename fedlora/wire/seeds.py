"""Codec of what forward-only clients trained: their seed and a number a step.

Local steps by ``train.gradient = "forward"`` and plain SGD move all that is trained along drawn
perturbations, so that seed and moves tell the whole change,

    w = w_start + sum_t a_t z_t,    z_t from (seed, t),    a_t = - rate_t g_t

four bytes a step, however large the adapter is (FedKSeed's uploads: Qin et al., ICML 2024, arXiv 2312.06353).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.factors import Tensors
from fedlora.core.perturbations import perturbation
from fedlora.errors import ConfigError, UpdateRefused
from fedlora.wire.steps import checked

SEED, MOVES = "seeds/seed", "seeds/moves"
"""The arrays that travel: the eight bytes of the seed, and a float32 for each step."""
MOST_MOVES = 4096
"""Steps of a round: the server draws each anew. They take 16 kB."""


@dataclass(frozen=True, slots=True)
class Seeds:
    """The moves of a client's steps along perturbations that its seed draws.

    It cannot write down any change, only what such steps made: the client hands it their moves
    (`fedlora.wire.Reply.written`).
    """

    name: str = "seeds"
    error: float = 0.0
    unbiased: bool = True
    of_change: bool = True
    feedback: bool = False
    of_steps: bool = True

    def most_bytes(self, tensors: Tensors, choose: int, steps: int) -> int:
        return 8 + 4 * steps  # the seed, and a move a step; whatever the tensors are

    def encode(self, start: Tensors, trained: Tensors, generator: torch.Generator, turn: int) -> Tensors:
        raise ConfigError(
            "upload = 'seeds': tells steps of train.gradient = 'forward' alone, it can write no other change"
        )

    def decode(self, start: Tensors, arrays: Tensors) -> Tensors:
        if arrays.keys() != {SEED, MOVES}:
            raise UpdateRefused(f"its arrays are {', '.join(sorted(arrays)) or 'none'}, not {SEED}, {MOVES}")
        seed = int.from_bytes(bytes(checked(SEED, arrays[SEED], torch.uint8, (8,)).tolist()), "big")
        moves = checked(MOVES, arrays[MOVES], torch.float32, (arrays[MOVES].numel(),))
        if len(moves) > MOST_MOVES:
            raise UpdateRefused(f"{MOVES}: {len(moves)} steps, at most {MOST_MOVES} are taken")
        if not torch.isfinite(moves).all():
            raise UpdateRefused(f"{MOVES}: a NaN or an infinity")
        return {key: moved(before, key, seed, moves) for key, before in start.items()}


def written(seed: int, moves: Tensor) -> Tensors:
    """The arrays that tell moves, (steps,), along the perturbations of a seed.

    Args:
        seed: >= 0 and below 2^64.
        moves: as `Seeds` tells them.

    Raises:
        ConfigError: more than `MOST_MOVES`.
    """
    if len(moves) > MOST_MOVES:
        raise ConfigError(
            f"upload = 'seeds': {len(moves)} local steps, at most {MOST_MOVES} are taken a round"
        )
    told = torch.tensor([*seed.to_bytes(8, "big")], dtype=torch.uint8)
    return {SEED: told, MOVES: moves.to("cpu", torch.float32)}


def moved(before: Tensor, key: str, seed: int, moves: Tensor) -> Tensor:
    """A tensor after the moves, float32; summed in float64, step by step."""
    total = before.double()
    for number, move in enumerate(moves.tolist()):
        total = total + move * perturbation(seed, number, key, before.shape)
    return total.float()
