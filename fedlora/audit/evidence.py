"""Evidence besides guessed coins: separations of canaries, drawn batches, pairs of updates."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from clients.budget import noise_of, rate_of
from fedlora.audit.canaries import HEAD
from fedlora.audit.separation import Expected, Separation, separation
from fedlora.audit.views import ServerView, standardised
from fedlora.privacy.plausible import flaw_of_draws, flaw_of_pairs, flaw_of_spread
from fedlora.server.federated_run import FederatedRun

FALSE_ALARM = 1e-3
"""Probability with which separations, draws and pairs, all together, speak against a right mechanism."""
TOGETHER = "together"


def separations_of(federation: FederatedRun, view: ServerView) -> dict[str, Separation]:
    """Separations of each group and of all together, where an update is the sum of what its steps let out.

    Returns:
        group -> separation; empty where theory does not say what it should be.
    """
    config, train = federation.config, federation.config.train
    if train.optimizer != "sgd" or train.momentum or train.weight_decay or train.proximal_mu:
        return {}
    if train.loraplus_lr_ratio != 1 or train.nested_ranks:  # parts of a canary move at another rate
        return {}
    scheduled = train.schedule != "constant" or train.warmup_steps
    if scheduled or any(group.own_train for group in config.groups):  # a step then has no one unit
        return {}
    found, pooled = {}, []
    for group, gains in view.gains.items():
        rate = (train.head_learning_rate if group == HEAD else 0.0) or train.learning_rate
        expected = {p: _expected(federation, view, p, gain) for p, gain in sorted(gains.items())}
        if not all(e.noise for e in expected.values()):
            return {}
        unit = rate * config.privacy.max_grad_norm / train.batch_size
        scores, (_, coins) = standardised(view, group, unit, expected), view.pooled(group)
        theory = float(np.mean([e.separation for e in expected.values()]))
        pooled.append((group, scores, coins, theory))
    if len(pooled) > 1:
        parts = [(s - s[~c].mean(), c) for _, s, c, _ in pooled]
        scores, coins = (np.concatenate(column) for column in zip(*parts, strict=True))
        sizes = [len(s) for _, s, _, _ in pooled]
        pooled.append((TOGETHER, scores, coins, float(np.average([t for *_, t in pooled], weights=sizes))))
    alarm = FALSE_ALARM / (len(pooled) + 2)
    for group, scores, coins, theory in pooled:
        found[group] = separation(scores, coins, theory, config.privacy.target_delta, alarm)
    return found


def _expected(federation: FederatedRun, view: ServerView, partition: int, gain: float) -> Expected:
    config = federation.config
    rate, steps = claimed_rate(federation, partition), config.local_steps_of(partition)
    return Expected(
        steps=view.rounds[partition] * steps,
        sample_rate=rate,
        noise_multiplier=noise_of(config, rate, steps),
        gain=gain,
    )


def flaws_of(federation: FederatedRun, view: ServerView) -> Iterator[str]:
    """Draws against the claimed rates, client by client; updates against independent noise, pair by pair."""
    alarm, clients = FALSE_ALARM / 5, sorted(view.rounds)
    rates = {p: claimed_rate(federation, p) for p in clients}
    for partition in clients:
        own = [(size, examples) for size, examples, p in view.draws if p == partition]
        flaw = flaw_of_draws([size for size, _ in own], own[0][1], rates[partition], alarm / len(clients))
        yield flaw and f"partition {partition}: {flaw}"
    yield flaw_of_spread([(size, examples, rates[p]) for size, examples, p in view.draws], alarm)
    yield flaw_of_pairs(view.residuals, alarm)


def claimed_rate(federation: FederatedRun, partition: int) -> float:
    """Probability with which an example or unit of a client is in a batch, as its ledger has it."""
    return rate_of(federation.config, partition, federation.runtime.data.num_protected(partition))
