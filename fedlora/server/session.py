"""Session of a run on an engine: what the run is lent, and the two interfaces of an engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flwr.serverapp import Grid

from clients.evaluation import Evaluation, evaluate
from clients.runtime import ClientRuntime
from clients.training.batches import Indices
from fedlora.config import RunConfig
from fedlora.core.state import State
from fedlora.secure.peers import Peers
from strategies.nodes import NodeDirectory

if TYPE_CHECKING:
    from fedlora.server.federated_run import FederatedRun


class Clock(Protocol):
    """Simulated time of a run.

    Attributes:
        unfit: partition -> why its device takes no part.
    """

    unfit: Mapping[int, str]

    def record(self) -> dict[str, Any]:
        """What the last round adds to its line in ``rounds.jsonl``."""


@dataclass(kw_only=True)
class Session:
    """Lends one run the server's model and data; an engine's own session also has the clients.

    Attributes:
        config: of the run, with what the engine decides (``engine.cohort-size``).
        runtime: the server's model and data.
        stores: where the clients keep what they hold, if that can be read from here: then it is a simulation.
        nodes: the partitions of the nodes of a deployment, which hold their data; None: those of the data
            here.
        declared_examples: partition -> how many examples its owner declared to the server; of the others
            nothing is known.
        node_directory: who is who among the nodes; None: what they say.
        peers: the nodes' public keys, with which they sign in secure sums; None: nobody signs.
        clock: of simulated time; None: time is not simulated.
    """

    config: RunConfig
    runtime: ClientRuntime
    stores: Path | None = None
    nodes: Collection[int] | None = None
    declared_examples: Mapping[int, int] = field(default_factory=dict)
    node_directory: NodeDirectory | None = None
    peers: Peers | None = None
    clock: Clock | None = None

    def grid(self, run: FederatedRun) -> Grid:
        """The clients of a run."""
        raise NotImplementedError

    def evaluate(self, state: State, indices: Indices) -> Evaluation:
        """The global model of a state on some of the test examples; here, in this process."""
        self.runtime.load_state(state)
        data = self.runtime.data
        precision = self.config.evaluation_precision
        return evaluate(self.runtime.model, data.test, indices, data.pad_token_id, precision=precision)

    def verify(self) -> None:
        """Called after the last round.

        Raises:
            RunFailed: the rounds cannot be relied on.
        """


class Engine(Protocol):
    """Carries out the clients of one run after the other.

    Attributes:
        size: how many messages it carries out at a time.
    """

    size: int

    def runtime(self, config: RunConfig) -> ClientRuntime:
        """The server's model and data of a configuration.

        Raises:
            ConfigError: a model, data or partition that cannot be had.
        """

    def session(self, config: RunConfig, path: Path) -> Session:
        """The session of a run.

        Args:
            config: of the run.
            path: its directory; in ``clients`` below it the clients keep what they hold.
        """

    def close(self) -> None:
        """Stop what was started."""
