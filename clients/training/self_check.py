"""Does DP-SGD compute what it claims on this model? Asked before training, because errors are silent.

Only made-up examples are used: whether the test passes says nothing about anybody's data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from clients.training import batches
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_step import PrivateSteps, private_steps
from clients.training.followed_norm import followed
from clients.training.made_up import (
    EXAMPLES,
    Named,
    all_of,
    clipped,
    kept,
    norms_by_row,
    one_by_one,
    prepared,
    synthetic_examples,
)
from clients.training.units import open_units
from fedlora.data.examples import Examples
from fedlora.errors import RunFailed, named_line
from fedlora.models import AdaptedModel
from fedlora.models.layers import in_half_precision
from fedlora.privacy import plausible
from fedlora.privacy.plausible import flaw_of_draws, flaw_of_noise, flaw_of_spread

TOLERANCE = 1e-3
"""Largest accepted difference, relative to the largest entry: far above rounding, far below any error."""
IN_HALF = 0.1
"""Likewise over a base in half precision: above its rounding, below an example that sees another."""
HUGE = 1e9
FALSE_ALARM = 1e-9
"""Probability with which correct noise is refused."""
LOOP = "privacy.grad-sample-mode = 'loop', slower"
"""What takes any model in which examples leave each other alone."""
COUNTS = 4000
"""Noisy counts that are drawn: 10 % more or less are 9 standard errors off."""
DRAWN_FROM, DRAWN_RATE, DRAWN_STEPS = 1000, 0.1, 400
"""Examples, rate and steps by which the drawing of batches is tested."""


def self_check(model: AdaptedModel, pad_token_id: int, mechanism: Mechanism) -> None:
    """`check_draws`, `check_steps` and `check_noise`, each once for a model and what it depends on.

    Args:
        model: loaded, so that it is known what is trained; it stays as it is.
        pad_token_id: fills up shorter sequences of a batch.
        mechanism: what is going to be trained with.

    Raises:
        RunFailed: a check does not hold, so nothing may be trained privately with this model.
    """
    trained = model.trainable()
    shapes = tuple((name, tuple(p.shape)) for name, p in {**trained.factors, **trained.head}.items())
    same_steps = replace(
        mechanism, noise_multiplier=0.0, count_noise=0.0, max_grad_norm=1.0, expected_batch_size=1
    )
    if ("draws",) not in model.passed:
        check_draws()
        model.passed.add(("draws",))
    if ("steps", shapes, same_steps) not in model.passed:
        check_steps(model, pad_token_id, same_steps)
        model.passed.add(("steps", shapes, same_steps))
    if ("noise", shapes, mechanism) not in model.passed:
        known = ("noise like", shapes, same_steps)
        numbers = plausible.NOISE_AGAIN if known in model.passed else plausible.NOISE_DRAWS
        check_count(mechanism)
        check_noise(model, pad_token_id, mechanism, numbers)
        model.passed |= {("noise", shapes, mechanism), known}


def check_steps(model: AdaptedModel, pad_token_id: int, mechanism: Mechanism) -> None:
    """Gradients and clipping, without noise.

    1. Every example's gradient (in ghost mode its norm) is that of a batch of one; a unit's is the mean.
    2. A step whose clipping norm is huge is a plain step of SGD on the mean loss.
    3. A step whose clipping binds is the mean of the gradients, clipped one by one; of units some and all.

    Raises:
        RunFailed: one of them does not hold.
    """
    examples = synthetic_examples(model, pad_token_id, units=mechanism.unit_examples > 0)
    with _in_words(model, mechanism), prepared(model) as named:
        alone = one_by_one(model, named, examples, pad_token_id)
        _check_gradients(model, named, examples, pad_token_id, mechanism, alone)
        norms = torch.stack([norms_by_row(g) for g in alone]).norm(dim=0)
        bounds = [("noise-free", HUGE), ("clipped", 0.7 * float(norms.mean()))]
        if mechanism.unit_examples:
            bounds.append(("clipped", 0.3 * float(norms.min())))
        for what, clip in bounds:
            clipping = replace(
                mechanism, noise_multiplier=0.0, count_noise=0.0, max_grad_norm=clip,
                expected_batch_size=len(norms),
            )  # fmt: skip
            wanted = clipped(alone, clip, mechanism.clipping, list(named), mechanism.shares)
            with _steps(model, named, clipping, examples) as private, kept(named.values()):
                private.step(examples, all_of(examples), pad_token_id)
                if private.norm and private.norm.counts != [float((norms <= clip).sum()) - len(norms) / 2]:
                    _refuse("the count of norms is not that of single examples")
                for (name, parameter), gradients in zip(named.items(), wanted, strict=True):
                    error = _gradient(parameter) - gradients.mean(dim=0)
                    _check(f"the {what} step of {name}", error, gradients)


def check_draws() -> None:
    """Batches are Poisson draws: all counts, those of each example, sizes, nothing from step to step.

    Raises:
        RunFailed: they are not.
    """
    rng = np.random.default_rng()
    everyone = np.arange(DRAWN_FROM)
    drawn = np.zeros((DRAWN_STEPS, DRAWN_FROM), dtype=bool)
    for step, batch in enumerate(batches.poisson_batches(everyone, DRAWN_RATE, DRAWN_STEPS, rng)):
        drawn[step, batch] = True
    tests = [
        flaw_of_draws(drawn.sum(axis=1).tolist(), DRAWN_FROM, DRAWN_RATE, FALSE_ALARM),
        flaw_of_spread([(int(n), DRAWN_STEPS, DRAWN_RATE) for n in drawn.sum(axis=0)], FALSE_ALARM),
        flaw_of_draws((drawn[1:] & drawn[:-1]).sum(axis=1).tolist(), DRAWN_FROM, DRAWN_RATE**2, FALSE_ALARM),
    ]
    for flaw in filter(None, tests):
        _refuse(flaw)


def check_count(mechanism: Mechanism) -> None:
    """The noise on the counts by which a clipping norm goes on, if it does, is N(0, count_noise^2).

    Raises:
        RunFailed: it has another law.
    """
    norm = followed(mechanism, torch.Generator().manual_seed(0))
    if norm is None:
        return
    for _ in range(COUNTS):
        norm.advance()
    counts = [torch.tensor([count], dtype=torch.float64) for count in norm.counts]
    if flaw := flaw_of_noise(counts, mechanism.count_noise, FALSE_ALARM):
        _refuse(f"the noise on the count of norms {flaw}")


def check_noise(model: AdaptedModel, pad_token_id: int, mechanism: Mechanism, numbers: int) -> None:
    """The noise is fresh, and N(0, noise_std^2) on each trained tensor and on all of them.

    Steps on nobody's data are compared with that law, see `flaw_of_noise`, and with each other, tensor by
    tensor: noise that comes twice cancels in a difference.

    Args:
        model: see `self_check`.
        pad_token_id: likewise.
        mechanism: likewise.
        numbers: how many are drawn at least.

    Raises:
        RunFailed: it has another one, or the same numbers come again.
    """
    examples = synthetic_examples(model, pad_token_id, units=mechanism.unit_examples > 0)
    mechanism = with_fixed_norm(mechanism)
    draws: list[list[Tensor]] = []
    with prepared(model) as named, _steps(model, named, mechanism, examples) as private:
        for _ in range(max(2, math.ceil(numbers / sum(p.numel() for p in named.values())))):
            private.step(examples, EXAMPLES[:0], pad_token_id)
            draws.append([_gradient(p).flatten().to("cpu", torch.float64, copy=True) for p in named.values()])
    begins = [begin for drawn in draws for tensor in drawn if (begin := beginning(tensor))]
    if len(set(begins)) < len(begins):
        _refuse("the same noise came twice")
    if flaw := flaw_of_tensors(list(named), draws, mechanism.noise_std):
        _refuse(flaw)


def _check_gradients(
    model: AdaptedModel,
    named: Named,
    examples: Examples,
    pad_token_id: int,
    mechanism: Mechanism,
    alone: Sequence[Tensor],
) -> None:
    with _steps(model, named, mechanism, examples) as private:
        private.optimizer.zero_grad()
        private.backward(examples, all_of(examples), pad_token_id)
        if mechanism.grad_sample_mode == "ghost":
            norms: list[Tensor] = [p._norm_sample for p in private.optimizer.params]
            _compare("per-example gradient norms", named, norms, [norms_by_row(g) for g in alone])
        else:
            _compare("per-example gradients", named, private.optimizer.grad_samples, alone)


def with_fixed_norm(mechanism: Mechanism) -> Mechanism:
    """The same with a clipping norm that stays where it begins."""
    quantile = mechanism.quantile
    return (
        mechanism if quantile is None else replace(mechanism, quantile=replace(quantile, learning_rate=0.0))
    )


def beginning(noise: Tensor) -> tuple[float, ...]:
    """Numbers by which noise is recognised; empty for so few that they come again by chance, on a grid."""
    return tuple(noise[:8].tolist()) if len(noise) >= 8 and noise.any() else ()


def flaw_of_tensors(names: Sequence[str], draws: Sequence[Sequence[Tensor]], std: float) -> str:
    """`flaw_of_noise` on each tensor and on all of them.

    Args:
        names: of the tensors.
        draws: for each step the noise on each tensor, flat, float64.
        std: its standard deviation.
    """
    by_tensor = dict(zip(names, zip(*draws, strict=True), strict=True))
    by_tensor["all trained tensors"] = tuple(torch.cat(list(step)) for step in draws)
    for name, steps in by_tensor.items():
        if flaw := flaw_of_noise(steps, std, FALSE_ALARM / len(by_tensor)):
            return f"the noise on {name} {flaw}"
    return ""


def _gradient(parameter: nn.Parameter) -> Tensor:
    """What the optimiser moved by: with steps of length 1, without the rounding of the sum."""
    assert parameter.grad is not None
    return parameter.grad


def _compare(what: str, named: Named, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Of Opacus' own gradients, which it cannot take where a layer sees something else than examples."""
    way_out = f"; try {LOOP}"
    for name, f, w in zip(named, found, wanted, strict=True):
        if f.shape != w.shape:
            _refuse(f"{what} of {name}: shape {tuple(f.shape)}, expected {tuple(w.shape)}", way_out)
        _check(f"{what} of {name}", f - w, w, way_out)


def _check(what: str, error: Tensor, reference: Tensor, way_out: str = "") -> None:
    if not negligible(error, reference):
        _refuse(f"{what}: wrong on this model", way_out)


def negligible(error: Tensor, reference: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether an error is rounding, beside what it is an error of."""
    return bool(error.abs().max() <= tolerance * reference.abs().max())


def tolerance_of(model: AdaptedModel) -> float:
    """What counts as rounding of a model's plain gradients; private ones are of float32 alone."""
    return IN_HALF if in_half_precision(model.module) else TOLERANCE


@contextmanager
def _in_words(model: AdaptedModel, mechanism: Mechanism) -> Iterator[None]:
    """Inside, whatever Opacus raises over a model becomes a refusal that says what of it is in the way."""
    try:
        yield
    except (RunFailed, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        head = sorted({name.rpartition(".")[0] for name in model.initial_head})
        kinds = {name: type(model.module.get_submodule(name)).__name__ for name in head}
        odd = ", ".join(f"{name} is a {kind}" for name, kind in kinds.items() if kind != "Linear")
        ways = ["model.pooling = 'mean'", "model.head = 'freeze'"] if odd else []
        if not odd and mechanism.grad_sample_mode == "ghost":
            ways = ["privacy.grad-sample-mode = 'hooks'"]
        if mechanism.grad_sample_mode != "loop":
            ways.append(LOOP)
        _refuse(
            f"Opacus cannot take the gradient of each example ({named_line(error)}"
            f"{f'; of the head {odd}' if odd else ''})",
            f"; try {' or '.join(ways)}" if ways else "",
        )


def _refuse(reason: str, way_out: str = "") -> None:
    raise RunFailed(f"privacy self-test: {reason}, nothing was trained{way_out}")


@contextmanager
def _steps(
    model: AdaptedModel, named: Named, mechanism: Mechanism, examples: Examples
) -> Iterator[PrivateSteps]:
    """Steps of length 1 by plain SGD, with whole units."""
    sgd = torch.optim.SGD(named.values(), lr=1.0)
    generator = torch.Generator(model.device).manual_seed(0)
    units = open_units(examples, EXAMPLES, len(EXAMPLES) if mechanism.unit_examples else 0, 0)
    with private_steps(model, sgd, mechanism, generator, units=units) as private:
        yield private
