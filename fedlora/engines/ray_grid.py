"""A Flower `Grid` on Ray actors: the ServerApp and its strategy cannot tell it from Flower's own.

What differs from Flower's simulation: the payload that many clients share is put into the object
store once; an actor that dies is replaced and its message retried; a client that is past the deadline
loses its actor, so that it cannot hold up the next round; nothing polls.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict

from fedlora.config import FlatConfig
from fedlora.engines.local_grid import LocalGrid
from fedlora.engines.ray_pool import RayPool

CLIENT_FAILED, CLIENT_DIED = 1, 2
"""Codes of error replies: the ClientApp raised; its process died more often than is retried."""


@dataclass(slots=True)
class Job:
    """A message on its way, and how often its process has died."""

    message: Message
    records: dict[str, Any]
    deaths: int = 0


class RayGrid(LocalGrid):
    """The simulated clients of one run, one node for each partition.

    Args:
        pool: the actors.
        partitions: the partition ids that exist.
        run_config: what every client's context holds.
        state_dir: where clients keep what they hold between messages.
        run_id: Flower's run id.
    """

    def __init__(
        self,
        pool: RayPool,
        partitions: Iterable[int],
        run_config: FlatConfig,
        state_dir: Path,
        run_id: int = 1,
    ) -> None:
        super().__init__(partitions, run_id)
        self._pool = pool
        self._run_config = run_config
        self._node_config: dict[str, Any] = {
            "num-partitions": len(self.partition_ids),
            "state-dir": str(state_dir),
            "simulation": True,
        }
        self._states: dict[int, RecordDict] = {}
        self._idle: deque[Any] = deque(pool.actors)
        self.retries = 0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Carry out all messages on the actors; replies come in order of completion.

        Messages still unanswered after ``timeout`` seconds are dropped without a reply.
        """
        import ray

        waiting = deque(self._jobs(messages))
        running: dict[Any, tuple[Job, Any]] = {}
        replies: list[Message] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        while waiting or running:
            while waiting and self._idle:
                job, actor = waiting.popleft(), self._idle.popleft()
                running[self._submit(actor, job)] = (job, actor)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, _ = ray.wait(list(running), num_returns=1, timeout=left)
            if not done:
                break
            job, actor = running.pop(done[0])
            reply, actor = self._collect(done[0], job, actor)
            self._idle.append(actor)
            if reply is None:
                waiting.appendleft(job)
            else:
                replies.append(reply)
        for _, actor in running.values():
            self._idle.append(self._pool.replace(actor))
        return replies

    # --- pieces -----------------------------------------------------------------------------------------

    def _jobs(self, messages: Iterable[Message]) -> list[Job]:
        """Messages with their shared records put into the object store once each."""
        import ray

        messages = list(messages)
        uses: dict[int, int] = {}
        for message in messages:
            for record in message.content.values():
                uses[id(record)] = uses.get(id(record), 0) + 1
        references: dict[int, Any] = {}
        jobs = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            records: dict[str, Any] = {}
            for name, record in message.content.items():
                if uses[id(record)] > 1 and id(record) not in references:
                    references[id(record)] = ray.put(record)
                records[name] = references.get(id(record), record)
            jobs.append(Job(message, records))
        return jobs

    def _submit(self, actor: Any, job: Job) -> Any:
        node = job.message.metadata.dst_node_id
        return actor.handle.remote(job.message.metadata, job.records, self._context(node))

    def _collect(self, reference: Any, job: Job, actor: Any) -> tuple[Message | None, Any]:
        """The reply to a job, or None if it is to be tried again; and the actor that is free now."""
        import ray

        try:
            content, state = ray.get(reference)
        except ray.exceptions.RayActorError:
            job.deaths += 1
            actor = self._pool.replace(actor)
            if job.deaths <= self._pool.engine.max_retries:
                self.retries += 1
                return None, actor
            reason = f"the client's process died {job.deaths} times (engine.max-retries = {job.deaths - 1})"
            return Message(Error(CLIENT_DIED, reason), reply_to=job.message), actor
        if isinstance(content, str):
            return Message(Error(CLIENT_FAILED, content), reply_to=job.message), actor
        self._states[job.message.metadata.dst_node_id] = state
        return Message(content, reply_to=job.message), actor

    def _context(self, node: int) -> Context:
        config: Mapping[str, Any] = {**self._node_config, "partition-id": self.partition_ids[node]}
        return Context(
            run_id=self._run_id,
            node_id=node,
            node_config=dict(config),
            state=self._states.get(node, RecordDict()),
            run_config=dict(self._run_config),
        )
