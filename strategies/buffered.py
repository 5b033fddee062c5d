"""Buffered asynchronous rounds: clients start and finish at their own time, and rounds do not wait.

FedBuff (Nguyen et al., AISTATS 2022, arXiv 2106.06639). M clients are at work; whoever finishes is replaced
by another at once, which starts from the global model of that moment. With K updates in the buffer they are
aggregated, each with the weight of its staleness: see `strategies.late`.

Notation: M is ``in_flight``, K is ``buffer_size``.
"""

from __future__ import annotations

from logging import INFO
from typing import Any

from flwr.common.logger import log

from fedlora.errors import ConfigError
from strategies.at_work import AtWork, EventGrid
from strategies.late import LateStrategy


class BufferedStrategy(LateStrategy):
    """Strategy of a rule whose rounds are aggregations of a buffer.

    Args:
        arguments, named: as of `LateStrategy`.
        in_flight: clients at work at a time, M.
        buffer_size: updates that make an aggregation, K.

    Raises:
        NotApplicable: a rule that cannot take late updates.
        ConfigError: fewer clients in flight than the buffer holds.
    """

    def __init__(self, *arguments: Any, in_flight: int, buffer_size: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        check_buffer(in_flight, buffer_size)
        self.in_flight, self.buffer_size = in_flight, buffer_size

    def _fill(self, clock: EventGrid, work: AtWork) -> None:
        while len(work.buffer) < self.buffer_size:
            while len(work.flights) < self.in_flight and self._start(clock, work, work.present):
                pass
            if not work.flights:
                break
            flight = work.pop()
            clock.seconds = max(clock.seconds, flight.arrives)
            self._arrive(work, flight)
        at_work = len(work.started), len(work.flights), len(work.buffer)
        log(INFO, "%s started, %s at work, %s in the buffer", *at_work)


def check_buffer(in_flight: int, buffer_size: int) -> None:
    """Refuse a buffer that never fills.

    Raises:
        ConfigError: it is larger than what is at work.
    """
    if in_flight < buffer_size:
        raise ConfigError(
            f"devices.buffer-size = {buffer_size}: must be at most devices.in-flight = {in_flight}"
        )
