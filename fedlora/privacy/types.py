"""A privacy loss never travels alone: epsilon with everything that it depends on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySpent:
    """What one client's training has cost so far.

    Attributes:
        epsilon: the loss of everything on the client's ledger, for the given delta.
        delta: target delta.
        granularity: what is hidden, ``example`` or ``client``.
        neighboring_relation: how two data sets differ, ``add_or_remove_one``.
        sampling_method: how batches are drawn, ``poisson``.
        accountant: ``prv``, ``pld`` or ``rdp``; always ``rdp`` where noise or rate changed on the way.
        noise_multiplier: noise standard deviation / clipping norm, of the last release.
        sample_rate: probability with which an example is in a batch, of the last release.
        steps: optimiser steps of all releases.
        releases: releases on the ledger, unfinished ones included.
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
    ledger_head: str = ""

    def told(self, *, count: bool) -> dict[str, object]:
        """What leaves the client.

        Args:
            count: the example count leaves it, too. Otherwise that does not follow exactly: noise and rate
                stay, and epsilon is rounded up to two decimals, so that a range of counts remains.
        """
        whole = dataclasses.asdict(self)
        if count:
            return whole
        kept = {key: value for key, value in whole.items() if key not in ("noise_multiplier", "sample_rate")}
        return kept | {"epsilon": math.ceil(100 * self.epsilon) / 100}
