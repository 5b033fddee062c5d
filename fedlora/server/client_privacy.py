"""Client-level privacy of a run: the mechanism that is configured, and what clients have spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedlora.config import RunConfig
from fedlora.privacy.calibration import calibrate_noise, epsilon_spent
from fedlora.privacy.types import NeighboringRelation, PrivacySpent
from strategies.client_dp import ClientDP

FULL = 1.0
"""The rate of a round: cohorts have a fixed size, clients know when they take part; nothing is amplified."""


def client_mechanism(config: RunConfig, *, seeded: bool) -> ClientDP | None:
    """The mechanism of a run with ``privacy.mode = "client"``, else None.

    Args:
        config: the run.
        seeded: in simulation, where the noise may be drawn again.

    Raises:
        ConfigError: a target that no noise reaches.
    """
    if not config.privacy.client_level:
        return None
    return ClientDP(
        clipping_norm=config.privacy.clipping_norm,
        noise_multiplier=client_noise(config),
        seed=config.seed if seeded else None,
    )


def client_noise(config: RunConfig) -> float:
    """The given noise multiplier, or the one that reaches the target after the most participations."""
    privacy = config.privacy
    if privacy.noise_multiplier:
        return privacy.noise_multiplier
    rounds = privacy.max_participations or config.num_server_rounds
    return calibrate_noise(privacy.target_epsilon, privacy.target_delta, FULL, rounds, privacy.accountant)


def clients_spent(config: RunConfig, participations: Mapping[int, int]) -> dict[int, dict[str, Any]]:
    """What each client has spent: one Gaussian mechanism for every round in which it was asked."""
    privacy, noise = config.privacy, client_noise(config)
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
            )
        )
        for partition, rounds in sorted(participations.items())
    }
