"""Seam of differential privacy: the places of a run where a mode acts, and what happens there without one.

A run asks its mechanism and knows no mode. In the order of a run:

    check           what the mode excludes, by configuration alone
    budget          what a client may spend, for people
    check_data      what it excludes in the data and ledgers that lie here
    step            what a client's step does to gradients, asked for the rehearsal
    local           a client's training as a release that is planned, charged and then made
    server          clipping and noise on updates, before any rule sees them
    shared_noise    how clients write shares of noise into secure sums
    spent           what each client has spent, where the server knows it and clients do not say
    beside          a second epsilon, for who sees less

A newcomer is a subclass and its mode among those that ``privacy.mode`` accepts. What a mode does in several
ways is within it: under adaptive clipping `clients.privacy.client` has another `server`, and all else stays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora.config import RunConfig
from strategies.rule import Rule

if TYPE_CHECKING:  # these import PEFT
    from clients.budget import PlannedRelease
    from clients.node import Node
    from clients.runtime import ClientRuntime
    from clients.training.dp_mechanism import Mechanism
    from fedlora import wire
    from fedlora.prepared.cache import Prepared
    from fedlora.secure.noise import SharedNoise
    from strategies.adaptive_dp import AdaptiveClientDP
    from strategies.client_dp import ClientDP


class PrivacyMechanism:
    """No privacy.

    Args:
        config: the run.

    Attributes:
        mode: of ``privacy.mode``.
        weighted_by_key: the metric by which clients weigh; None where their example counts are hidden.
        tells_losses: the record of a round has the clients' training loss.
        draws_batches: batches are drawn example by example, so that their size is an expectation.
    """

    mode: ClassVar[str] = "none"
    weighted_by_key: ClassVar[str | None] = "num-examples"
    draws_batches: ClassVar[bool] = False

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @property
    def private(self) -> bool:
        """Whether anything is hidden at all."""
        return self.mode != "none"

    @property
    def tells_losses(self) -> bool:
        return True

    @property
    def max_participations(self) -> int:
        """Rounds in which one client may train at most; 0 means all of them."""
        return self.config.privacy.max_participations if self.private else 0

    def budget(self) -> str:
        """What a client may spend in the run, in words."""
        privacy = self.config.privacy
        return f"epsilon {privacy.target_epsilon:g} at delta {privacy.target_delta:g}"

    def check(self, rule: Rule, kept: str) -> None:
        """Refuse what the mode excludes.

        Args:
            rule: of the run.
            kept: what clients train and keep to themselves, see `fedlora.server.validate.kept`.

        Raises:
            NotApplicable: what it excludes by its nature.
            ConfigError: a value that it cannot work with.
        """

    def check_data(self, data: Prepared | None, partitions: Collection[int]) -> None:
        """Refuse data that cannot be trained on privately, and warn of a delta that is too large.

        Args:
            data: of the clients; None where nodes hold their own.
            partitions: those that take part.
        """

    def check_ledgers(
        self, data: Prepared, partitions: Collection[int], stores: Path, heads: Mapping[int, str]
    ) -> None:
        """Refuse ledgers here that the run cannot go on with.

        Args:
            data: of the clients.
            partitions: those that take part.
            stores: where simulated clients keep what they hold.
            heads: a head that each ledger had, as far as the server remembers one.
        """

    def step(self) -> Mechanism | None:
        """Clipping of a client's step, without noise; None for plain steps."""
        return None

    def local(
        self,
        runtime: ClientRuntime,
        instruction: wire.TrainInstruction,
        node: Node,
        *,
        seed: int,
        start: Callable[[], str],
        cohort: Sequence[int] = (),
    ) -> PlannedRelease | None:
        """A client's training as a release, not yet charged; None where it releases no more than updates.

        Args:
            runtime: the model and the data.
            instruction: what is asked for.
            node: where.
            seed: the client's own of this round, which decides nothing outside of a simulation.
            start: makes a digest of what training starts from.
            cohort: who trains together, on which the last bits depend; empty where the client trains alone.

        Raises:
            LedgerRefused: the ledger cannot be read.
            ConfigError: a configuration that the mode does not cover.
        """
        return None

    def server(self, *, seeded: bool) -> ClientDP | AdaptiveClientDP | None:
        """Makes updates private before they are aggregated; None where they are as they come.

        Args:
            seeded: in simulation, where the noise may be drawn again.
        """
        return None

    @property
    def shared_noise(self) -> Callable[[int], SharedNoise] | None:
        """How clients write changes with shares of noise, by how many may be in a sum; None: none."""
        return None

    def spent(self, participations: Mapping[int, int]) -> dict[int, dict[str, Any]]:
        """Spending of each client that took part so often, where the server knows it; else empty.

        Args:
            participations: rounds by partition.
        """
        return {}

    def beside(self, claim: Mapping[str, Any], clients: int) -> dict[str, Any]:
        """What a client's claim says beside its epsilon, which is against whoever sees most.

        Args:
            claim: fields of `fedlora.privacy.types.PrivacySpent`, of a reply or of `spent`.
            clients: that take part.
        """
        return {}
