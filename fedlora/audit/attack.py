"""The attacker's guesses: canaries of high score were in the data, those of low score were not.

How many are guessed is fixed beforehand (`CHOICES`), so that a bound does not profit from having looked; each
choice pays for the others (Bonferroni).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedlora.audit.bounds import epsilon_bound, largest_bound, shared_confidence

Scores = np.ndarray[tuple[int], np.dtype[np.float64]]
Coins = np.ndarray[tuple[int], np.dtype[np.bool_]]

CHOICES = ((0.45, 0.45), (0.25, 0.25), (0.125, 0.125), (0.25, 0.0))
"""Shares of the canaries that are guessed to be in and to be out; the attacker abstains from the rest.

Not one half each: so many are seldom in, and a perfect attack would have to guess wrong.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What one attack shows.

    Attributes:
        canaries: m.
        guesses: r, of the choice that shows most.
        right: v, of that choice.
        epsilon: the lower bound, 0 if nothing is shown.
        largest: the most that so many canaries could show.
    """

    canaries: int
    guesses: int
    right: int
    epsilon: float
    largest: float


def bound_of(scores: Scores, included: Coins, delta: float, confidence: float) -> Bound:
    """The best lower bound over `CHOICES`, at a confidence that holds for all of them together.

    Args:
        scores: one for each canary; high says that it was in the data.
        included: the coins.
        delta: of the claim.
        confidence: of the bound.
    """
    canaries = len(scores)
    each = shared_confidence(confidence, len(CHOICES))
    order = np.argsort(scores, kind="stable")
    found, largest = [], 0.0
    for share_in, share_out in CHOICES:
        ins, outs = int(share_in * canaries), int(share_out * canaries)
        right = int(included[order[canaries - ins :]].sum()) + int((~included[order[:outs]]).sum())
        found.append((epsilon_bound(canaries, ins + outs, right, delta, each), ins + outs, right))
        largest = max(largest, largest_bound(canaries, ins + outs, delta, each))
    epsilon, guesses, right = max(found, key=lambda entry: entry[0])
    return Bound(canaries=canaries, guesses=guesses, right=right, epsilon=epsilon, largest=largest)
