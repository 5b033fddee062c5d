"""Private training within a client's own budget: reserve what a round costs, train, say what is spent.

A release is written down and flushed to disk before it is trained. In seeded simulation a round that is
run again gives the same bits and is charged once; with real entropy every attempt is charged.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from uuid import uuid4

from clients.holdings import Holdings
from clients.private import train_private
from clients.resident import Resident
from clients.training import LocalResult
from fedlora.config import RunConfig
from fedlora.errors import BudgetExceeded
from fedlora.privacy.calibration import calibrate_noise, epsilon_spent
from fedlora.privacy.types import PrivacySpent


def train_within_budget(
    worker: Resident,
    config: RunConfig,
    holdings: Holdings,
    *,
    partition_id: int,
    server_round: int,
    local_steps: int,
    seed: int | None,
) -> tuple[LocalResult, PrivacySpent]:
    """One round of DP-SGD, and what the client has spent by then.

    The noise is calibrated on the client's own example count, for the most rounds that the server lets
    it take part in (``privacy.max-participations``, else all of them).

    Args:
        worker: the model, loaded, and the data.
        config: the run.
        holdings: where the client writes down its releases.
        partition_id: whose budget.
        server_round: names the release in seeded simulation.
        local_steps: steps of this round.
        seed: of the batches and the noise; None draws both from the operating system.

    Raises:
        BudgetExceeded: another round would cost more than ``privacy.target-epsilon``.
    """
    indices = worker.data.indices(partition_id)
    rate = config.train.batch_size / len(indices)
    noise = noise_of(config, rate, local_steps)
    spending = Spending(holdings.directory / "spent" / f"{partition_id}.jsonl")
    release = f"round-{server_round}" if seed is not None else uuid4().hex
    spent = privacy_spent(config, noise, rate, spending.steps(including=release, steps=local_steps))
    if spent.epsilon > config.privacy.target_epsilon and not config.privacy.noise_multiplier:
        raise BudgetExceeded(
            f"privacy.target-epsilon = {config.privacy.target_epsilon}: "
            f"{spent.steps} steps would spend {spent.epsilon:.3f}"
        )
    spending.reserve(release, local_steps)
    result = train_private(
        worker.model,
        worker.data.train,
        indices,
        worker.data.pad_token_id,
        config.train,
        local_steps=local_steps,
        noise_multiplier=noise,
        max_grad_norm=config.privacy.max_grad_norm,
        seed=seed or 0,
        secure=seed is None,
        release_loss=config.privacy.release_metrics,
    )
    return result, spent


def noise_of(config: RunConfig, sample_rate: float, local_steps: int) -> float:
    """The given noise multiplier, or the one that reaches the target epsilon after the most rounds."""
    privacy = config.privacy
    if privacy.noise_multiplier:
        return privacy.noise_multiplier
    steps = local_steps * (privacy.max_participations or config.num_server_rounds)
    return calibrate_noise(
        privacy.target_epsilon, privacy.target_delta, sample_rate, steps, privacy.accountant
    )


def privacy_spent(config: RunConfig, noise: float, sample_rate: float, steps: int) -> PrivacySpent:
    """The whole claim: epsilon with all that it depends on."""
    privacy = config.privacy
    return PrivacySpent(
        epsilon=epsilon_spent(noise, sample_rate, steps, privacy.target_delta, privacy.accountant),
        delta=privacy.target_delta,
        granularity="example",
        neighboring_relation="add_or_remove_one",
        sampling_method="poisson",
        accountant=privacy.accountant,
        noise_multiplier=noise,
        sample_rate=sample_rate,
        steps=steps,
    )


class Spending:
    """The releases of one client in one run: a file of JSON lines, ``release`` and ``steps``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def steps(self, *, including: str, steps: int) -> int:
        """Steps of all releases, and of one more unless it is written down already."""
        releases = self._releases()
        return sum({**releases, including: releases.get(including, steps)}.values())

    def reserve(self, release: str, steps: int) -> None:
        """Write a release down, on disk when this returns; one that is there is not charged again."""
        if release in self._releases():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as stream:
            stream.write(json.dumps({"release": release, "steps": steps}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _releases(self) -> dict[str, int]:
        if not self.path.exists():
            return {}
        entries = [json.loads(line) for line in self.path.read_text().splitlines()]
        return {entry["release"]: entry["steps"] for entry in entries}
