"""Local training with example-level differential privacy: DP-SGD from the parts of Opacus.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, Algorithm 1. Each step draws every
example with probability q = batch_size / n, clips each example's gradient over *all* trained tensors
(factors and head) to ``max_grad_norm`` C, and moves by

    ( sum_i clip(g_i, C) + N(0, noise_multiplier^2 C^2) ) / batch_size

where batch_size is the expected one, whatever was drawn. An empty draw is a step of noise alone.
How a step does that is in `clients.training.dp_step`; `clients.training.self_check` asks first whether it
really does.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import torch

from clients.training.batches import Indices, poisson_batches
from clients.training.canaries import Canaries, among
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_step import private_steps
from clients.training.nested import NestedSteps
from clients.training.optimizers.registry import finish, make_optimizer
from clients.training.reference import with_references
from clients.training.schedule import ONLY_ROUND, ScheduledRates, Stage, at_rest, rate_factors
from clients.training.self_check import FALSE_ALARM, self_check
from clients.training.train import LocalResult, Penalties, dropout_stream, local_result
from clients.training.units import open_units
from fedlora.config import TrainConfig
from fedlora.core.seeding import derive, stream
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError, RunFailed
from fedlora.models import AdaptedModel
from fedlora.privacy.plausible import flaw_of_draws


def train_private(
    model: AdaptedModel,
    examples: Examples,
    indices: Indices,
    pad_token_id: int,
    config: TrainConfig,
    *,
    local_steps: int,
    mechanism: Mechanism,
    seed: int,
    release_loss: bool = False,
    canaries: Canaries | None = None,
    sample_rate: float | None = None,
    stage: Stage = ONLY_ROUND,
) -> LocalResult:
    """As `clients.training.train.train_local`, by DP-SGD; always ``local_steps`` steps.

    Args:
        model: loaded with the client's starting values.
        examples: the data set.
        indices: the client's examples in it.
        pad_token_id: fills up shorter sequences of a batch.
        config: optimiser, rates, proximal term, and the expected batch size.
        local_steps: steps, each of which costs privacy.
        mechanism: of each step; ``secure`` draws batches too from the operating system and ignores ``seed``.
        seed: this client's and round's own seed; whoever knows it can subtract the noise.
        release_loss: return the training loss, which is outside the guarantee.
        canaries: what an audit hides among the examples; the sample rate is as without them.
        sample_rate: probability with which an example is in a batch; None: batch size / examples, or units.
        stage: where the round stands in its run.

    Raises:
        ConfigError: a configuration that DP-SGD does not cover, see `check_private`.
        RunFailed: a private step does not compute what it claims on this model.
    """
    examples = with_references(model, examples, [indices], pad_token_id)
    seed, draw = private_streams(seed, secure=mechanism.secure)
    units = open_units(examples, indices, mechanism.unit_examples, seed)
    protected = indices if units is None else units.everyone
    rate = config.batch_size / len(protected) if sample_rate is None else sample_rate
    check_private(config, rate)
    self_check(model, pad_token_id, mechanism)
    noise = torch.Generator(model.device).manual_seed(derive(seed, "noise"))
    total, sizes = torch.zeros((), device=model.device), list[int]()
    with (
        model.training() as trained,
        dropout_stream(seed, model.device),
        private_steps(
            model,
            optimizer := make_optimizer(trained, config),
            mechanism,
            noise,
            None if canaries is None else canaries.rows({**trained.factors, **trained.head}),
            units,
            torch.Generator().manual_seed(derive(seed, "counts")),
        ) as private,
    ):
        rates = ScheduledRates(optimizer, rate_factors(config, local_steps, stage))
        penalties = Penalties(trained, config)  # they know no data: added after the noise
        nested = NestedSteps(trained, config, local_steps, seed)

        def after_noise(_: object) -> None:
            nested.end()
            for parameter in private.resting:
                parameter.grad = None
            penalties.add_gradient()

        private.optimizer.attach_step_hook(after_noise)
        everyone, resting = among(protected, canaries, len(examples)), at_rest(trained.factors, config)
        for step, drawn in enumerate(poisson_batches(everyone, rate, local_steps, draw)):
            private.resting = resting[step % 2]
            rates.advance()
            nested.begin()
            total += private.step(examples, drawn, pad_token_id)
            sizes.append(len(drawn))
        finish(optimizer)
    if canaries is not None:
        canaries.drew(sizes, len(everyone))
    check_drawn(sizes, len(everyone), rate)
    loss = float(total) / max(sum(sizes), 1) if release_loss else None
    return local_result(model, trained, len(indices), local_steps, loss)


def check_drawn(sizes: Sequence[int], examples: int, sample_rate: float) -> None:
    """Hold the batches that were drawn to the rate that is claimed; they know nobody's data.

    Args:
        sizes: of the batches.
        examples: how many could be drawn.
        sample_rate: probability of each.

    Raises:
        RunFailed: they are no draws with that rate, so nothing may be released.
    """
    if flaw := flaw_of_draws(sizes, examples, sample_rate, FALSE_ALARM):
        raise RunFailed(f"privacy self-test: {flaw}; nothing is released")


def private_streams(seed: int, *, secure: bool) -> tuple[int, np.random.Generator]:
    """The seed of noise and dropout, and the generator of the Poisson draws; ``secure`` ignores the seed."""
    if secure:
        return secrets.randbits(128), np.random.default_rng()  # 128 bits from the operating system
    return seed, stream(seed, "poisson")


def check_private(config: TrainConfig, sample_rate: float = 1.0) -> None:
    """Refuse what DP-SGD does not cover.

    Raises:
        ConfigError: fewer examples (or units of several) than the batch size, epochs instead of steps, or a
            second clipping.
    """
    if sample_rate > 1:
        raise ConfigError(
            f"train.batch-size = {config.batch_size}: private training needs at least as many examples "
            "at each client, or units where privacy.unit-column is set"
        )
    if config.local_epochs:
        raise ConfigError(
            f"train.local-epochs = {config.local_epochs}: must be 0 under privacy, set train.local-steps"
        )
    if config.max_grad_norm:
        raise ConfigError(
            f"train.max-grad-norm = {config.max_grad_norm}: must be 0 in private training, "
            "privacy.max-grad-norm clips each example"
        )
