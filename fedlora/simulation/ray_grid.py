"""A Flower `Grid` on Ray actors: the ServerApp and its strategy cannot tell it from Flower's own.

What differs from Flower's simulation: the model and the payload that many clients share are put into the
object store once; clients may train in cohorts; an actor that dies is replaced and its messages retried; a
client that is past the deadline loses its actor, so that it cannot hold up the next round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict

from fedlora.config import FlatConfig
from fedlora.core.base_patches import Patch
from fedlora.simulation.actor import RemoteMessage
from fedlora.simulation.dispatch import Dispatcher, Job
from fedlora.simulation.local_grid import CLIENT_FAILED, LocalGrid
from fedlora.simulation.ray_cluster import put
from fedlora.simulation.ray_pool import RayPool
from fedlora.simulation.scheduling import Work, cohorts, equal_work
from fedlora.simulation.shared_model import SharedModel


class RayGrid(LocalGrid):
    """The simulated clients of one run, one node for each partition.

    Args:
        pool: the actors.
        partitions: the partition ids that exist.
        run_config: what every client's context holds.
        state_dir: where clients keep what they hold between messages.
        run_id: Flower's run id.
        shared_model: the model and the data that fedlora's ClientApp uses; None for another ClientApp.
        base: the patches that are in the base now.
        cohort_size: instructions to train that one actor carries out together, with a shared model.
        work: what a partition's training costs, in any unit: the longest go first.
    """

    def __init__(
        self,
        pool: RayPool,
        partitions: Iterable[int],
        run_config: FlatConfig,
        state_dir: Path,
        run_id: int = 1,
        *,
        shared_model: SharedModel | None = None,
        base: Callable[[], Sequence[Patch]] = tuple,
        cohort_size: int = 1,
        work: Work = equal_work,
    ) -> None:
        super().__init__(partitions, run_id)
        self._run_config = run_config
        self._node_config: dict[str, Any] = {
            "num-partitions": len(self.partition_ids),
            "state-dir": str(state_dir.absolute()),
            "simulation": True,
        }
        self._states: dict[int, RecordDict] = {}
        self._dispatcher = Dispatcher(pool)
        self._shared_model, self._base, self._work = shared_model, base, work
        self._cohort_size = 1 if shared_model is None else cohort_size

    @property
    def retries(self) -> int:
        """Number of times that a process died and its messages were carried out again."""
        return self._dispatcher.retries

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Carry out all messages on the actors; replies come in order of completion.

        Messages still unanswered after ``timeout`` seconds are dropped without a reply.

        Raises:
            RunFailed: a process that died more often than ``engine.max-retries`` allows.
        """
        messages = list(messages)
        shared = _put_shared(messages)
        ref = None if self._shared_model is None else self._shared_model.move_to(self._base())
        jobs = []
        for group in cohorts(messages, self.partition_ids, self._cohort_size, self._work):
            remote = [RemoteMessage(m.metadata, shared(m), self._context(m)) for m in group]
            ids = ", ".join(str(self.partition_ids[m.metadata.dst_node_id]) for m in group)
            jobs.append(Job("handle", (remote, ref), f"partition {ids}", group))
        return [
            self._reply(message, *answer)
            for job, answers in self._dispatcher.run(jobs, timeout)
            for message, answer in zip(job.subject, answers, strict=True)
        ]

    def _reply(self, message: Message, content: RecordDict | str, state: RecordDict) -> Message:
        if isinstance(content, str):
            return Message(Error(CLIENT_FAILED, content), reply_to=message)
        self._states[message.metadata.dst_node_id] = state
        return Message(content, reply_to=message)

    def _context(self, message: Message) -> Context:
        node = message.metadata.dst_node_id
        config: Mapping[str, Any] = {**self._node_config, "partition-id": self.partition_ids[node]}
        return Context(
            run_id=self._run_id,
            node_id=node,
            node_config=dict(config),
            state=self._states.get(node, RecordDict()),
            run_config=dict(self._run_config),
        )


def _put_shared(messages: Sequence[Message]) -> Callable[[Message], dict[str, Any]]:
    """Put every record that several messages share into the object store, once; the records of a message."""
    uses: dict[int, int] = {}
    for message in messages:
        message.metadata.__dict__["_message_id"] = str(uuid4())
        for record in message.content.values():
            uses[id(record)] = uses.get(id(record), 0) + 1
    references: dict[int, Any] = {}

    def records(message: Message) -> dict[str, Any]:
        for record in message.content.values():
            if uses[id(record)] > 1 and id(record) not in references:
                references[id(record)] = put(record)
        return {name: references.get(id(r), r) for name, r in message.content.items()}

    return records
