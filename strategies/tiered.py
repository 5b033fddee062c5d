"""Tiers: clients of like speed make synchronous rounds of their own, and merge them as they are done.

After FedAT (Chai et al., SC 2021, arXiv 2010.05958). The clients are sorted by what their work takes into M
tiers of equal size. Each tier samples clients, waits for all of them and merges what they brought; then it
starts again, from the global model of that moment. An update is as stale as its tier is slow, and is weighted
for that as in `strategies.late`.

Deviation: FedAT keeps a model for each tier and weighs these by how often the *other* tiers have merged; here
there is one model, to which a tier adds its clients' mean change times s(tau).

Notation: M is ``tiers``.
"""

from __future__ import annotations

from logging import INFO
from typing import Any

from flwr.common.logger import log

from strategies.at_work import AtWork, EventGrid
from strategies.late import LateStrategy
from strategies.sampling import clients_of_round


class TieredStrategy(LateStrategy):
    """Strategy of a rule whose rounds are those of one tier after the other.

    Args:
        arguments, named: as of `LateStrategy`; ``fraction_train`` is of each tier.
        tiers: how many there are, M.

    Raises:
        NotApplicable: a rule that cannot take late updates.
    """

    def __init__(self, *arguments: Any, tiers: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.tiers = tiers

    def _fill(self, clock: EventGrid, work: AtWork) -> None:
        tier_of = clock.tiers(self.tiers)
        while not work.buffer:
            at_work = {tier_of[flight.partition_id] for flight in work.flights.values()}
            for tier in range(self.tiers):
                if tier not in at_work:
                    self._start_tier(clock, work, tier)
            if not work.flights:
                break
            ends = dict[int, float]()
            for flight in work.flights.values():
                tier = tier_of[flight.partition_id]
                ends[tier] = max(ends.get(tier, 0.0), flight.arrives)
            done = min(ends, key=lambda tier: (ends[tier], tier))
            clock.seconds = max(clock.seconds, ends[done])
            for flight in [f for f in work.flights.values() if tier_of[f.partition_id] == done]:
                self._arrive(work, work.take(flight.number))
            log(
                INFO,
                "tier %s is done: %s in the buffer, %s at work",
                done,
                len(work.buffer),
                len(work.flights),
            )

    def _start_tier(self, clock: EventGrid, work: AtWork, tier: int) -> None:
        """Start as many of a tier as a round of it asks."""
        among = work.present[clock.tiers(self.tiers)[work.present] == tier]
        for _ in range(clients_of_round(self.selection.fraction_train, len(among))):
            if not self._start(clock, work, among):
                break
