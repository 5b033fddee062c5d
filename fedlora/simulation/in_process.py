"""Engine in this process, without Ray: for small runs and for debuggers.

A client's message goes the way that it goes everywhere: encoded, decoded, `clients.handler`, encoded. Clients
train in the cohorts in which they would on Ray, so that a run has the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from clients.handler import handle, handle_together
from clients.runtime import ClientRuntime, RuntimeCache
from fedlora.config import RunConfig, to_flat
from fedlora.errors import named_line
from fedlora.server.session import Session
from fedlora.simulation.local_grid import CLIENT_FAILED, LocalGrid
from fedlora.simulation.scheduling import Work, cohorts, predicted_work, with_cohort_size
from fedlora.simulation.timed_grid import timed

if TYPE_CHECKING:
    from fedlora.server.federated_run import FederatedRun


class InProcessEngine:
    """Lends one run after the other the model of this process; see `fedlora.server.session.Engine`."""

    size = 1

    def __init__(self) -> None:
        self.runtimes = RuntimeCache()

    def runtime(self, config: RunConfig) -> ClientRuntime:
        """The model and data of a configuration."""
        return self.runtimes.get(config)

    def session(self, config: RunConfig, path: Path) -> InProcessSession:
        """The session of a run."""
        return InProcessSession(self, with_cohort_size(config, path, self.runtime(config)), path / "clients")

    def close(self) -> None:
        """Let the model go."""
        self.runtimes = RuntimeCache()


class InProcessSession(Session):
    """Session whose server and clients use one model in turn.

    Args:
        engine: lends it.
        config: of the run, ``engine.cohort-size`` decided.
        stores: where the clients keep what they hold.
    """

    def __init__(self, engine: InProcessEngine, config: RunConfig, stores: Path) -> None:
        super().__init__(config=config, runtime=engine.runtime(config), stores=stores)
        self._engine = engine

    def grid(self, run: FederatedRun) -> Grid:
        """One node for each partition of the run."""
        work = predicted_work(self.config, self.runtime.data)
        return timed(InProcessGrid(self._engine.runtimes, run, work), run, work)


class InProcessGrid(LocalGrid):
    """Flower Grid that handles each message when it is sent.

    Args:
        runtimes: of this process.
        run: whose clients these are.
        work: of a partition.
    """

    def __init__(self, runtimes: RuntimeCache, run: FederatedRun, work: Work) -> None:
        super().__init__(run.partitions)
        self._runtimes, self._run_config = runtimes, to_flat(run.config)
        self._cohort_size = run.config.engine.cohort_size
        self._work = work
        self._states = {node: RecordDict() for node in self.partition_ids}
        self._node_config = {"state-dir": str(run.session.stores), "simulation": True}

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Handle all messages; those that were not begun after ``timeout`` seconds are dropped."""
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        for group in cohorts(list(messages), self.partition_ids, self._cohort_size, self._work):
            if deadline is None or time.monotonic() < deadline:
                replies += map(_reply, group, self._contents(group))
        return replies

    def _contents(self, group: Sequence[Message]) -> list[RecordDict | str]:
        """Replies to the messages, or the one-line error of a client."""
        nodes = []
        for message in group:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            partition = self.partition_ids[message.metadata.dst_node_id]
            nodes.append({**self._node_config, "partition-id": partition})
        contents, configs = [message.content for message in group], [self._run_config] * len(group)
        states = [self._states[message.metadata.dst_node_id] for message in group]
        try:
            if len(group) > 1:
                return handle_together(contents, configs, nodes, self._runtimes, states)
            kind = group[0].metadata.message_type
            return [handle(kind, contents[0], configs[0], nodes[0], self._runtimes, states[0])]
        except Exception as error:
            logging.getLogger("fedlora").exception("client failed")
            return [named_line(error)] * len(group)


def _reply(message: Message, content: RecordDict | str) -> Message:
    if isinstance(content, str):
        return Message(Error(CLIENT_FAILED, content), reply_to=message)
    return Message(content, reply_to=message)
