"""Arrivals of one round in simulated time: whose replies are taken, and when the round ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.simulation.devices import ClientTask


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Outcome of one round's waiting.

    Attributes:
        seconds: from the orders to the end of the round.
        taken: the partitions whose replies are taken -> when they arrived, in seconds of the round.
        lost: the others -> why theirs are not.
    """

    seconds: float
    taken: dict[int, float]
    lost: dict[int, str]


def wait_for(tasks: Sequence[ClientTask], *, deadline: float, wanted: int) -> Arrivals:
    """Wait for the first ``wanted`` replies, and no longer than ``deadline``.

    The server does not know who has vanished: where too few are left, it waits until the deadline.

    Args:
        tasks: what was ordered.
        deadline: in seconds from the orders on.
        wanted: how many replies are enough.

    >>> tasks = [ClientTask(0, 1, 5, 1), ClientTask(1, 1, 1, 1), ClientTask(2, 9, 9, 9)]
    >>> wait_for(tasks, deadline=10, wanted=3)
    Arrivals(seconds=10, taken={1: 3, 0: 7}, lost={2: 'late: it takes 27 s, the deadline is 10 s'})
    """
    answering = sorted((t for t in tasks if t.vanishes is None), key=lambda t: (t.seconds, t.partition_id))
    on_time = [task for task in answering if task.seconds <= deadline]
    taken = {task.partition_id: task.seconds for task in on_time[:wanted]}
    enough = len(taken) == min(wanted, len(tasks))
    lost = {
        task.partition_id: _why(task, deadline, wanted)
        for task in sorted(tasks, key=lambda t: t.partition_id)
        if task.partition_id not in taken
    }
    return Arrivals(max(taken.values(), default=0.0) if enough else deadline, taken, lost)


def _why(task: ClientTask, deadline: float, wanted: int) -> str:
    if task.vanishes is not None:
        return f"vanished after {task.vanishes:.3g} s"
    if task.seconds > deadline:
        return f"late: it takes {task.seconds:.3g} s, the deadline is {deadline:g} s"
    return f"not waited for: {wanted} others were faster than its {task.seconds:.3g} s"
