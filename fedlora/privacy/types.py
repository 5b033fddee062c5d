"""A privacy loss never travels alone: epsilon with everything that it depends on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from fedlora.config.privacy import ADD_OR_REMOVE_ONE, ZERO_OUT_ONE
from fedlora.privacy.accountants import History

if TYPE_CHECKING:
    from fedlora.privacy.spending import Release, Standing


class NeighboringRelation(StrEnum):
    """How two data sets differ that a claim holds apart by at most epsilon.

    Poisson-subsampled Gaussian steps with a rate and a noise that do not differ between them cost the same
    under both. A rate of batch size / examples differs as soon as the number of examples does.
    """

    ZERO_OUT_ONE = ZERO_OUT_ONE
    """By one example that is replaced by nothing, its place being kept; the number of examples is public."""
    ADD_OR_REMOVE_ONE = ADD_OR_REMOVE_ONE
    """By one example more or less; rate and noise go by a number that the owner of the data declares."""


CLIENT = ":client"
"""Unit of a release that hides all of a client's data; no column has such a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySpent:
    """What one client's training has cost so far.

    Attributes:
        epsilon: the loss of all that the client released in this run, for the given delta.
        delta: what it is for: the target, or more where noise and rate changed, see `fedlora.privacy.filter`.
        granularity: what is hidden, ``example``, ``unit`` (``privacy.unit-column``) or ``client``.
        neighboring_relation: how two data sets differ, see `NeighboringRelation`.
        sampling_method: how batches are drawn, ``poisson``.
        accountant: ``prv``, ``pld`` or ``rdp``; always ``rdp`` where noise or rate changed on the way.
        noise_multiplier: noise standard deviation / clipping norm, of the last release.
        sample_rate: probability with which an example or unit is in a batch, of the last release.
        steps: optimiser steps of the run's releases.
        releases: how many these are, unfinished ones included.
        history: noise multiplier, sample rate and steps of each setting that was charged; empty where they
            are not known, or something else than Poisson-subsampled Gaussian steps was released.
        on_evaluations: of epsilon, what evaluations with noise cost, at delta 0.
        ledger_head: what every later state of the ledger contains, see `fedlora.privacy.ledger`.
    """

    epsilon: float
    delta: float
    granularity: str
    neighboring_relation: str
    sampling_method: str
    accountant: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    releases: int = 1
    history: History = ()
    on_evaluations: float = 0.0
    ledger_head: str = ""

    @classmethod
    def of(cls, standing: Standing, release: Release | None = None) -> PrivacySpent:
        """The claim of what a run has on a ledger; ``release`` is its last, if that is not an evaluation."""
        noise, rate = standing.history[-1][:2] if standing.history else (0.0, 0.0)
        if release is not None:
            noise, rate = release.setting
        unit = "" if release is None else release.unit
        granularity = "client" if unit == CLIENT else "unit" if unit else "example"
        return cls(
            epsilon=standing.epsilon,
            delta=standing.delta,
            granularity=granularity,
            neighboring_relation=standing.neighboring_relation,
            sampling_method="none" if granularity == "client" else "poisson",
            accountant=standing.accountant,
            noise_multiplier=noise,
            sample_rate=rate,
            steps=standing.steps,
            releases=standing.releases,
            history=standing.history,
            on_evaluations=standing.on_evaluations,
            ledger_head=standing.head,
        )

    def told(self, *, count: bool, simulated: bool = False) -> dict[str, object]:
        """What leaves the client.

        Args:
            count: the example count leaves it, too. Otherwise, where noise and rate go by the real count
                (which those for whole clients do not), they stay, and epsilon is rounded up to two decimals;
                whoever wants to can still find it out.
            simulated: nothing has to be kept from the server; the history goes along for its records.
        """
        whole = dataclasses.asdict(self)
        if (
            count
            or self.granularity == "client"
            or self.neighboring_relation == NeighboringRelation.ADD_OR_REMOVE_ONE
        ):
            return whole
        stays = ("noise_multiplier", "sample_rate", *(() if simulated else ("history",)))
        kept = {key: value for key, value in whole.items() if key not in stays}
        return kept | {"epsilon": math.ceil(100 * self.epsilon) / 100}
