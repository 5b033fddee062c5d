"""Dispatches jobs to actors, in the given order, each to whoever is free first; what dies is done again.

The driver sleeps until an actor answers, dies, or the deadline passes; only while nobody works does it look
now and then whether an actor can still start.

Ray's own ``max_restarts`` and ``max_task_retries`` would not replace this: a job is retried on the actor that
died, which has to start first while others are free; an actor that is killed for its deadline runs the same
job again before the next one; and what a job died of is not told.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedlora.errors import RunFailed, first_line
from fedlora.simulation.ray_pool import RayPool

PATIENCE = 30.0
"""Seconds in which actors usually start; after them it is said what they wait for."""


@dataclass(slots=True, eq=False)
class Job:
    """A call of a method of `ClientActor`.

    Attributes:
        method: its name.
        arguments: its arguments.
        name: what it is, for people.
        subject: what it is about, for the caller.
        deaths: how often a process has died of it.
    """

    method: str
    arguments: tuple[Any, ...]
    name: str
    subject: Any = None
    deaths: int = 0


class Dispatcher:
    """Carries out jobs on the actors of a pool; ``retries`` counts those that were started again."""

    def __init__(self, pool: RayPool) -> None:
        self._pool = pool
        self._waiting: deque[Job] = deque()
        self._free: deque[Any] = deque()
        self._busy: dict[Any, tuple[Job | None, Any]] = {}  # by reference; no job: it is starting
        self.retries = 0

    def run(self, jobs: Iterable[Job], timeout: float | None = None) -> list[tuple[Job, Any]]:
        """The jobs with their results, in order of completion; those past the deadline are left out.

        An actor past the deadline is replaced, so that it cannot hold up what comes next.

        Raises:
            RunFailed: a job whose process died more than ``engine.max-retries`` times, actors that die as
                often while they start or that no machine of the cluster holds any more, or a job that raised.
        """
        self._waiting = deque(jobs)
        self._muster()
        finished = []
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while self._hand_out():
                answered = self._next_answer(deadline)
                if answered is None:
                    break
                finished += self._take_in(answered)
        finally:
            for job, actor in self._busy.values():
                if job is not None:
                    self._pool.replace(actor)
        return finished

    def _muster(self) -> None:
        starting = self._pool.starting
        self._free = deque(actor for actor in self._pool.actors if actor not in starting)
        self._busy = {starting[actor]: (None, actor) for actor in self._pool.actors if actor in starting}

    def _hand_out(self) -> bool:
        """Give every free actor a job; whether there is anything left to wait for."""
        while self._waiting and self._free:
            job, actor = self._waiting.popleft(), self._free.popleft()
            self._busy[getattr(actor, job.method).remote(*job.arguments)] = (job, actor)
        return bool(self._waiting) or any(job is not None for job, _ in self._busy.values())

    def _next_answer(self, deadline: float | None) -> Any:
        """The reference of whoever answers first, None past the deadline.

        Where nobody works, because no actor has found a place or has started, it is said once what for.
        """
        import ray

        told = False
        while True:
            left = math.inf if deadline is None else max(0.0, deadline - time.monotonic())
            idle = all(job is None for job, _ in self._busy.values())
            look = min(left, PATIENCE) if idle else left
            done, _ = ray.wait(list(self._busy), timeout=None if look == math.inf else look)
            if done or look == left:
                return done[0] if done else None
            line = self._pool.waits_for()
            if not told:
                logging.getLogger("fedlora").warning(line)
            told = True

    def _take_in(self, reference: Any) -> list[tuple[Job, Any]]:
        """The finished job, if that is what the reference stands for."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

        job, actor = self._busy.pop(reference)
        try:
            result = ray.get(reference)
        except (RayActorError, OutOfMemoryError, WorkerCrashedError) as error:
            self._bury(job, actor, error)
            return []
        except RayTaskError as error:
            raise RunFailed(f"a client process failed: {first_line(error.cause)}") from None
        self._free.append(actor)
        if job is None:
            self._pool.is_ready(actor)
            return []
        return [(job, result)]

    def _bury(self, job: Job | None, actor: Any, error: Exception) -> None:
        most = self._pool.engine.max_retries
        fresh = self._pool.replace(actor)
        self._busy[self._pool.starting[fresh]] = (None, fresh)
        if job is None:
            self._pool.failed_starts += 1
            if self._pool.failed_starts > most:
                raise RunFailed(
                    f"client processes die while they start (engine.max-retries = {most}): "
                    f"{first_line(error)}"
                )
            return
        job.deaths += 1
        if job.deaths > most:
            raise RunFailed(
                f"{job.name}: the process died {job.deaths} times (engine.max-retries = {most}): "
                f"{first_line(error)}"
            )
        self.retries += 1
        self._waiting.appendleft(job)
