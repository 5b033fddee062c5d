"""Client-level privacy without trust in the server: clients clip and noise their own updates in secure sums.

Each adds a share of discrete Gaussian noise (`fedlora.secure.noise`) to what goes under masks. A sum is of
n >= ``secure.min-clients`` clients, of which at most c = ``secure.colluding`` tell the server their noise, or
add none; that of T = min-clients - c others is worth the noise multiplier z, on which the claim rests. Who
sees the model alone, in which all shares are, sees noise of

    z_n = z sqrt((n s^2 - t^2) / (T s^2 - t^2)) >= z sqrt(n / T).

Fewer than min-clients uploads leave no sum: clients then refuse to take masks off, and the round fails. Each
round is one Gaussian mechanism at rate 1, written down in the client's own ledger before it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.privacy.client import FULL, ClientPrivacy
from fedlora.errors import NotApplicable
from fedlora.privacy.calibration import epsilon_spent
from fedlora.privacy.types import CLIENT
from fedlora.secure.noise import SharedNoise, worth
from strategies.rule import Rule

if TYPE_CHECKING:
    from clients.budget import PlannedRelease
    from clients.node import Node
    from clients.runtime import ClientRuntime
    from fedlora import wire
    from fedlora.prepared.cache import Prepared

KEY = "secure.noise = 'distributed'"


class DistributedClientPrivacy(ClientPrivacy):
    """One client is hidden from everybody: the server sees noisy sums."""

    charges_ledgers = True

    @property
    def tells_losses(self) -> bool:
        return False

    def check(self, rule: Rule, kept: str) -> None:
        """Refuse what shares of noise do not cover, and what would leave a client beside the noisy sum."""
        super().check(rule, kept)
        privacy = self.config.privacy
        only = {
            "noise-bands": (privacy.noise_bands, 1, "noise that a later round takes back was a client's own"),
            "clipping": (privacy.clipping, "flat", "norms are counted nowhere"),
            "release-metrics": (privacy.release_metrics, False, "nothing leaves a client but the noisy sum"),
        }
        for key, (value, wanted, why) in only.items():
            if value != wanted:
                raise NotApplicable(f"{KEY}: privacy.{key} = {value!r}: {why}, must be {wanted!r}")

    def shared(self, clients: int) -> SharedNoise:
        """How the clients of a round write changes and noise.

        Args:
            clients: that may be in its sum.

        Raises:
            ConfigError: see `SharedNoise`.
        """
        return SharedNoise(
            clipping_norm=self.config.privacy.clipping_norm,
            noise_multiplier=self.noise,
            honest=self.config.secure.honest,
            clients=clients,
            bits=self.config.secure.bits,
        )

    @property
    def shared_noise(self) -> Callable[[int], SharedNoise]:
        return self.shared

    def noise_of(self, clients: int) -> float:
        """The noise multiplier that so many shares of noise are worth."""
        return worth(self.noise, self.config.secure.honest, clients)

    def check_ledgers(
        self, data: Prepared, partitions: Collection[int], stores: Path, heads: Mapping[int, str]
    ) -> None:
        from clients.ledger_ref import check_ledgers, ledger_directory

        ledgers = ledger_directory(self.config, stores, simulation=True)
        check_ledgers(self.config, data, partitions, ledgers, heads, CLIENT)

    def local(
        self,
        runtime: ClientRuntime,
        instruction: wire.TrainInstruction,
        node: Node,
        *,
        seed: int,
        start: Callable[[], str],
        cohort: Sequence[int] = (),
    ) -> PlannedRelease:
        from clients.budget import plan_whole
        from clients.ledger_ref import ledger_ref_of

        return plan_whole(
            runtime,
            self.config,
            ledger_ref_of(self.config, instruction, node),
            partition_id=node.partition_id,
            server_round=instruction.server_round,
            noise_multiplier=self.noise,
            seed=seed if node.simulation else None,
            start=start() if node.simulation else "",
            cohort=cohort,
        )

    def server(self, *, seeded: bool) -> None:
        """Nothing: the noise is in the sum."""

    def spent(self, participations: Mapping[int, int]) -> dict[int, dict[str, Any]]:
        """Nothing: clients' ledgers say it."""
        return {}

    def beside(self, claim: Mapping[str, Any], clients: int) -> dict[str, Any]:
        """``epsilon_of_model``, for who sees the model alone, where every client adds its noise."""
        privacy, rounds, secure = self.config.privacy, claim.get("steps"), self.config.secure
        if type(rounds) is not int or not 1 <= rounds <= self.config.num_server_rounds:
            return {}
        noise = self.noise_of(secure.min_clients)
        found = epsilon_spent(noise, FULL, rounds, privacy.target_delta, privacy.accountant)
        return {"epsilon_of_model": found, "colluding": secure.colluding}
