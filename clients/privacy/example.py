"""Example-level privacy: clients train by DP-SGD within a ledger of their own (`clients.budget`).

The methods import what they need when they are called, because it imports PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from clients.privacy.mechanism import PrivacyMechanism
from clients.privacy.sums import epsilon_of_sums
from fedlora.errors import ConfigError, NotApplicable
from fedlora.privacy.calibration import warn_of_delta
from fedlora.privacy.quantile import quantile_of
from strategies.rule import Rule

if TYPE_CHECKING:
    from clients.budget import PlannedRelease
    from clients.node import Node
    from clients.runtime import ClientRuntime
    from clients.training.dp_mechanism import Mechanism
    from fedlora import wire
    from fedlora.prepared.cache import Prepared


class ExamplePrivacy(PrivacyMechanism):
    """One example at a client, or all that one unit has there, is hidden, from its server too."""

    mode: ClassVar[str] = "example"
    weighted_by_key: ClassVar[str | None] = None
    draws_batches: ClassVar[bool] = True

    def check(self, rule: Rule, kept: str) -> None:
        from clients.training.dp_sgd import check_private

        config = self.config
        if config.data.partitioner == "bootstrap":
            raise ConfigError(
                "data.partitioner = 'bootstrap': clients share examples; under privacy.mode = 'example' each "
                "belongs to one client"
            )
        if kept and not config.privacy.release_metrics:
            raise NotApplicable(
                f"privacy.release-metrics = false: {kept} is measured by clients alone, and what they find "
                "tells which domains they hold; true lets them"
            )
        if config.train.precision != "float32":
            raise ConfigError(
                f"train.precision = {config.train.precision!r}: must be 'float32' in private training, whose "
                "self-test compares gradients to rounding"
            )
        check_private(config.train)
        if config.train.gradient_checkpointing:
            raise ConfigError(
                "train.gradient-checkpointing = true: must be false in private training, whose per-example "
                "gradients are wrong where a layer runs twice"
            )
        if config.lora.method != "lora" and config.privacy.grad_sample_mode != "loop":
            raise ConfigError(
                f"lora.method = {config.lora.method!r}: privacy.grad-sample-mode = "
                f"{config.privacy.grad_sample_mode!r}: Opacus sees lora alone, use 'loop'"
            )

    def check_data(self, data: Prepared | None, partitions: Collection[int]) -> None:
        """Nodes look at their own."""
        if data is None:
            return
        from clients.budget import rate_of
        from clients.ledger_ref import check_disjoint, warn_of_spread
        from clients.training.dp_sgd import check_private

        config = self.config
        rates = {p: rate_of(config, p, data.num_protected(p)) for p in partitions}
        for partition, rate in rates.items():
            check_private(config.train_of(partition), rate)
        self._check_count(rates)
        check_disjoint(config, data, partitions)
        warn_of_spread(config, data, partitions)
        largest = min(rates, key=lambda p: rates[p])
        public = round(config.train_of(largest).batch_size / rates[largest])
        what = "units" if config.privacy.unit_column else "examples"
        warn_of_delta(config.privacy.target_delta, public, f"{what} of partition {largest}")

    def _check_count(self, rates: Mapping[int, float]) -> None:
        """Refuse a count of norms that leaves nothing for the sum, of each client by its own noise."""
        from clients.budget import noise_of

        if (quantile := quantile_of(self.config.privacy)) is None or not quantile.count_noise:
            return
        for partition, rate in rates.items():
            noise = noise_of(self.config, rate, self.config.local_steps_of(partition))
            quantile.noise_of_sum(noise, self.config.train_of(partition).batch_size)

    def check_ledgers(
        self, data: Prepared, partitions: Collection[int], stores: Path, heads: Mapping[int, str]
    ) -> None:
        from clients.ledger_ref import check_ledgers, example_of, ledger_directory

        unit, cut = self.config.privacy.unit_column, example_of(self.config, data)
        ledgers = ledger_directory(self.config, stores, simulation=True)
        check_ledgers(self.config, data, partitions, ledgers, heads, unit, cut)

    def step(self) -> Mechanism:
        from clients.training.dp_mechanism import Mechanism

        return replace(Mechanism.of(self.config.privacy, 1), max_grad_norm=1.0, count_noise=0.0)

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
        from clients.budget import plan_release
        from clients.ledger_ref import ledger_ref_of

        config = self.config
        return plan_release(
            runtime,
            config,
            ledger_ref_of(config, instruction, node),
            partition_id=node.partition_id,
            server_round=instruction.server_round,
            local_steps=config.local_steps_of(node.partition_id),
            seed=seed if node.simulation else None,
            start=start() if node.simulation else "",
            cohort=cohort,
        )

    def beside(self, claim: Mapping[str, Any], clients: int) -> dict[str, Any]:
        """``epsilon_of_sums``, for who sees sums alone, where it is known."""
        found = epsilon_of_sums(self.config, claim, clients)
        return {} if found is None else {"epsilon_of_sums": found, "colluding": self.config.secure.colluding}
