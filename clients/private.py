"""Local training with example-level differential privacy: DP-SGD from the parts of Opacus.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, Algorithm 1. Each step draws every
example with probability q = batch_size / n, clips each example's gradient over *all* trained tensors
(factors and head) together to ``max_grad_norm`` C, and moves by

    ( sum_i clip(g_i, C) + N(0, noise_multiplier^2 C^2) ) / batch_size

where batch_size is the expected one, whatever was drawn. An empty draw is a step of noise alone.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from clients.batches import Indices, load_batch, poisson_batches
from clients.training import (
    LocalResult,
    Proximal,
    batch_loss,
    dropout_stream,
    local_result,
    make_optimizer,
)
from fedlora.config import TrainConfig
from fedlora.data.examples import Examples
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel
from fedlora.seeding import derive, stream


def train_private(
    model: AdaptedModel,
    examples: Examples,
    indices: Indices,
    pad_token_id: int,
    config: TrainConfig,
    *,
    local_steps: int,
    noise_multiplier: float,
    max_grad_norm: float,
    seed: int,
    secure: bool = False,
    release_loss: bool = False,
) -> LocalResult:
    """As `clients.training.train_local`, by DP-SGD; always ``local_steps`` steps.

    Args:
        model: loaded with the client's starting values.
        examples: the data set.
        indices: the client's examples in it.
        pad_token_id: fills up shorter sequences of a batch.
        config: optimiser, rates, proximal term, and the expected batch size.
        local_steps: steps, each of which costs privacy.
        noise_multiplier: noise standard deviation / ``max_grad_norm``.
        max_grad_norm: the norm that each example's gradient is clipped to.
        seed: this client's and round's own seed; whoever knows it can subtract the noise.
        secure: draw batches and noise from the operating system's entropy and ignore ``seed``.
        release_loss: return the training loss, which is outside the guarantee.

    Raises:
        ConfigError: a configuration that DP-SGD does not cover, see `check_private`.
    """
    check_private(config, len(indices))
    if secure:
        seed = secrets.randbits(128)
    total, seen = torch.zeros((), device=model.device), 0
    with (
        model.training() as trained,
        dropout_stream(seed, model.device),
        per_example_gradients(model.module),
    ):
        proximal = Proximal(trained.all, config.proximal_mu)
        optimizer = (SystemNoiseOptimizer if secure else DPOptimizer)(
            make_optimizer(trained, config),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=config.batch_size,
            generator=torch.Generator(model.device).manual_seed(derive(seed, "noise")),
        )
        optimizer.attach_step_hook(lambda _: proximal.add_gradient())  # knows no data: after the noise
        rate = config.batch_size / len(indices)
        for drawn in poisson_batches(indices, rate, local_steps, stream(seed, "poisson")):
            optimizer.zero_grad()
            total += backward(model, trained.all, examples, drawn, pad_token_id)
            optimizer.step()
            seen += len(drawn)
    loss = float(total) / max(seen, 1) if release_loss else None
    return local_result(model, trained, len(indices), local_steps, loss)


def check_private(config: TrainConfig, num_examples: int) -> None:
    """Refuse what DP-SGD does not cover.

    Raises:
        ConfigError: fewer examples than the batch size, epochs instead of steps, or a second clipping.
    """
    if config.batch_size > num_examples:
        raise ConfigError(
            f"train.batch-size = {config.batch_size}: private training needs at least as many examples, "
            f"this client has {num_examples}"
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


@contextmanager
def per_example_gradients(module: nn.Module) -> Iterator[None]:
    """Inside, a backward pass of a *summed* loss fills ``grad_sample`` of every trained parameter.

    Opacus' hooks sit on the trained layers only, and no trace of them is left afterwards.
    """
    watched = GradSampleModule(module, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        watched.to_standard_module()
        for layer in module.modules():  # what a step that failed half-way leaves
            vars(layer).pop("activations", None)
            vars(layer).pop("max_batch_len", None)
        for parameter in module.parameters():
            vars(parameter).pop("summed_grad", None)


def backward(
    model: AdaptedModel,
    parameters: list[nn.Parameter],
    examples: Examples,
    drawn: Indices,
    pad_token_id: int,
) -> Tensor:
    """The summed loss of the drawn examples, detached, their gradients left in ``grad_sample``."""
    if len(drawn) == 0:
        for parameter in parameters:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        return torch.zeros((), device=model.device)
    loss = batch_loss(model, load_batch(examples, drawn, pad_token_id, model.device), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


class SystemNoiseOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with noise from the operating system.

    torch's CPU generator keeps only 32 bits of its seed, which can be tried out one by one.
    """

    def add_noise(self) -> None:
        """``grad = summed_grad + N(0, (noise_multiplier C)^2)``, added in float64 and then rounded."""
        for parameter in self.params:
            noise = self.noise_multiplier * self.max_grad_norm * system_normal(parameter.shape)
            noisy = parameter.summed_grad.cpu().double() + noise
            parameter.grad = noisy.to(parameter.dtype).to(parameter.device)


def system_normal(shape: torch.Size) -> Tensor:
    """Standard normal float64 numbers by the inverse distribution function of 52 random bits each."""
    bits = np.frombuffer(os.urandom(8 * shape.numel()), dtype=np.uint64) >> np.uint64(12)
    uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)
    normal: Tensor = torch.special.ndtri(uniform)
    return normal.reshape(shape)
