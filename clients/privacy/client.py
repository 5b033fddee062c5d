"""Client-level privacy: the server clips and noises whole updates (`strategies.client_dp`).

One Gaussian mechanism for every round in which a client was asked, also where the noise is correlated over
rounds (`fedlora.privacy.banded`): then it is asked at most once in so many. Nothing is amplified.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from clients.privacy.mechanism import PrivacyMechanism
from fedlora.config.checks import require
from fedlora.errors import NotApplicable
from fedlora.privacy.banded import most_participations, square_root
from fedlora.privacy.calibration import calibrate_noise, epsilon_spent, warn_of_delta
from fedlora.privacy.quantile import quantile_of
from fedlora.privacy.types import NeighboringRelation, PrivacySpent
from strategies.adaptive_dp import AdaptiveClientDP
from strategies.client_dp import ClientDP, never_cancels
from strategies.registry import RULES
from strategies.rule import Rule
from strategies.server_optimizer import ServerOptimizer

if TYPE_CHECKING:
    from fedlora.prepared.cache import Prepared

FULL = 1.0
"""The rate of a round: cohorts have a fixed size, clients know when they take part; nothing is amplified."""


class ClientPrivacy(PrivacyMechanism):
    """One client is hidden in the global model, from everybody but the server."""

    mode: ClassVar[str] = "client"
    weighted_by_key: ClassVar[str | None] = None
    charges_ledgers: ClassVar[bool] = False
    """Whether clients keep ledgers, which hold them to ``privacy.target-epsilon``."""

    @property
    def tells_losses(self) -> bool:
        """The guarantee covers the model; losses of clients are outside unless they are released."""
        return self.config.privacy.release_metrics

    @property
    def noise(self) -> float:
        """The given noise multiplier, or the one that reaches the target after the most participations.

        Raises:
            ConfigError: a target that no noise reaches.
        """
        privacy = self.config.privacy
        if privacy.noise_multiplier:
            return privacy.noise_multiplier
        return calibrate_noise(
            privacy.target_epsilon, privacy.target_delta, FULL, self.most_rounds, privacy.accountant
        )

    def budget(self) -> str:
        privacy = self.config.privacy
        if not privacy.noise_multiplier or self.charges_ledgers:
            return super().budget()
        most = epsilon_spent(
            privacy.noise_multiplier, FULL, self.most_rounds, privacy.target_delta, privacy.accountant
        )
        return (
            f"epsilon {most:.3g} at delta {privacy.target_delta:g} after {self.most_rounds} rounds of one, "
            f"by noise-multiplier {privacy.noise_multiplier:g} (beside which target-epsilon is no limit)"
        )

    @property
    def most_rounds(self) -> int:
        """The most rounds that one client can take part in."""
        privacy = self.config.privacy
        return most_participations(
            self.config.num_server_rounds, privacy.noise_bands, privacy.max_participations
        )

    @property
    def max_participations(self) -> int:
        """As configured, and no more than a target's noise was made for, where rounds may be done again.

        Correlated noise sees to that itself: a client takes part once in so many rounds, each of which is
        done once.
        """
        privacy = self.config.privacy
        given = privacy.noise_multiplier > 0 or privacy.noise_bands > 1
        return privacy.max_participations if given else self.most_rounds

    @property
    def coefficients(self) -> tuple[float, ...]:
        """How rounds of noise are correlated, for the server's momentum."""
        strategy = self.config.strategy
        optimizer = ServerOptimizer(name=strategy.server_optimizer, beta_1=strategy.server_beta_1)
        return square_root(self.config.privacy.noise_bands, optimizer.momentum)

    def check(self, rule: Rule, kept: str) -> None:
        """Refuse what noise on a mean does not cover: no mean, a robust centre, or unequal scalings."""
        mode, config, name = "privacy.mode = 'client'", self.config, rule.facts.name
        if not rule.facts.client_dp:
            able = ", ".join(n for n, r in RULES.items() if r.facts.client_dp)
            raise NotApplicable(
                f"{mode}: the aggregate of {name} is no mean of what is shipped, so that noise on a sum does "
                f"not cover it (able: {able})"
            )
        if not rule.center.is_mean:
            robust = config.strategy.robust
            raise NotApplicable(f"{mode}: strategy.robust = {robust!r} is no mean, must be 'none'")
        if config.strategy.max_update_norm:
            raise NotApplicable(
                f"{mode}: strategy.max-update-norm = {config.strategy.max_update_norm:g} tells who is beyond "
                "it, outside the guarantee; privacy.clipping-norm bounds everybody"
            )
        bands = config.privacy.noise_bands
        if bands > 1 and (why := never_cancels(rule)):
            raise NotApplicable(f"privacy.noise-bands = {bands}: {why}")
        if kept:
            raise NotApplicable(f"{mode}: {kept} is measured by clients, outside the guarantee")
        if (quantile := quantile_of(config.privacy)) is not None:
            if bands > 1:
                raise NotApplicable(
                    f"privacy.noise-bands = {bands}: later rounds take noise back, but their clipping norm "
                    "is another one with privacy.clipping = 'adaptive'"
                )
            quantile.noise_of_sum(self.noise, 1)
        ranks = {*config.lora.rank_list} | {g.rank for g in config.groups if g.rank is not None}
        if len(ranks) > 1 or any(g.alpha is not None for g in config.groups):
            raise NotApplicable(
                f"{mode}: needs equal ranks and alphas, a client's own would stretch its norm"
            )

    def check_data(self, data: Prepared | None, partitions: Collection[int]) -> None:
        warn_of_delta(self.config.privacy.target_delta, len(partitions), "clients")
        config, bands = self.config, self.config.privacy.noise_bands
        share = config.fraction_train * config.devices.over_selection
        asked = max(config.min_train_nodes, int(share * len(partitions) + 1e-9))
        require(
            bands == 1 or asked * bands <= len(partitions), "privacy.noise-bands", bands,
            f"a client takes part once in so many rounds, so of {len(partitions)} at most "
            f"{len(partitions) // bands} can be asked in each; fraction-train = {config.fraction_train:g} "
            f"and min-train-nodes = {config.min_train_nodes} ask {asked}",
        )  # fmt: skip

    def server(self, *, seeded: bool) -> ClientDP | AdaptiveClientDP | None:
        fixed = ClientDP(
            clipping_norm=self.config.privacy.clipping_norm,
            noise_multiplier=self.noise,
            seed=self.config.seed if seeded else None,
            coefficients=self.coefficients,
        )
        quantile = quantile_of(self.config.privacy)
        return fixed if quantile is None else AdaptiveClientDP(fixed, quantile)

    def spent(self, participations: Mapping[int, int]) -> dict[int, dict[str, Any]]:
        privacy, noise = self.config.privacy, self.noise
        return {
            partition: asdict(
                PrivacySpent(
                    epsilon=epsilon_spent(noise, FULL, rounds, privacy.target_delta, privacy.accountant),
                    delta=privacy.target_delta,
                    granularity="client",
                    neighboring_relation=NeighboringRelation.ZERO_OUT_ONE,
                    sampling_method="none",
                    accountant=privacy.accountant,
                    noise_multiplier=noise,
                    sample_rate=FULL,
                    steps=rounds,
                    releases=rounds,
                    history=((noise, FULL, rounds),),
                )
            )
            | {"noise_bands": privacy.noise_bands}
            for partition, rounds in sorted(participations.items())
        }
