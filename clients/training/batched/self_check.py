"""Does a cohort's step compute what its clients' own steps compute, on this model? Asked before training.

Two clients with made-up examples are compared with a plain loop over single examples, once in a process for
what it depends on. A model in which examples or padding take part in each other's results fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clients.training.batched.layers import why_alone
from clients.training.batched.members import Member
from clients.training.batched.train import BatchSettings, Cohort
from clients.training.dp_mechanism import Mechanism
from clients.training.made_up import EXAMPLES, Named, clipped, one_by_one, prepared, synthetic_examples
from clients.training.self_check import (
    HUGE,
    TOLERANCE,
    beginning,
    check_count,
    check_draws,
    flaw_of_tensors,
    negligible,
    tolerance_of,
)
from fedlora.config import TrainConfig
from fedlora.core.adapters import lora_set
from fedlora.core.init_drawn import fresh_adapters
from fedlora.data.examples import Examples
from fedlora.errors import RunFailed
from fedlora.models import AdaptedModel
from fedlora.privacy import plausible

SHARED_OUT = (EXAMPLES[:3], EXAMPLES[3:])
"""Which of the made-up examples each of the two clients has."""
FIRST_OF_UNITS, SHARED_UNITS = (EXAMPLES[[0, 2]], EXAMPLES[3:]), (EXAMPLES[:2], EXAMPLES[2:3])
"""Likewise of the units that they make up: by their first examples, and by their places among the units."""
NOBODY = (EXAMPLES[:0], EXAMPLES[:0])


def check_cohort(model: AdaptedModel, pad_token_id: int, mechanism: Mechanism | None) -> None:
    """Check gradients, clipping and noise, as `clients.training.self_check` asks them of Opacus.

    Args:
        model: loaded with one of the clients, so that it is known what is trained; it stays as it is.
        pad_token_id: fills up shorter sequences.
        mechanism: of one of the clients; None where they train without privacy.

    Raises:
        RunFailed: a cohort computes something else, so nothing is trained.
    """
    trained = model.trainable()
    shapes = tuple((name, tuple(p.shape)) for name, p in {**trained.factors, **trained.head}.items())
    real = mechanism  # a rehearsal has no noise yet: any will do that is no power of itself
    if mechanism is not None and not mechanism.noise_multiplier:
        real = replace(mechanism, noise_multiplier=0.7, max_grad_norm=1.3)
    if ("cohort", shapes, real) in model.passed:
        return
    examples = synthetic_examples(model, pad_token_id, units=real is not None and real.unit_examples > 0)
    with model.computing(torch.float32), prepared(model) as named:
        alone = dict(zip(named, one_by_one(model, named, examples, pad_token_id), strict=True))
        cohort = _two_clients(model, named, examples, pad_token_id, real)
        with cohort.route_laid():
            if real is None:
                means = {name: [g[own].mean(dim=0) for own in SHARED_OUT] for name, g in alone.items()}
                _compare("gradient", cohort.plain(SHARED_OUT), means, tolerance_of(model))
            else:
                check_draws()
                check_count(real)
                _check_clipping(cohort, real, alone)
                _check_noise(cohort, real)
    model.passed.add(("cohort", shapes, real))


def why_apart(model: AdaptedModel, pad_token_id: int) -> str:
    """Reason that examples of several clients cannot share a pass of this model; empty where they can.

    Args:
        model: any; it is loaded anew, with LoRA of rank 1.
        pad_token_id: fills up shorter sequences.
    """
    if reason := why_alone(model):
        return reason
    model.load(fresh_adapters(model.modules, 1, 1.0, 0), {}, trained=frozenset("AB"))
    try:
        check_cohort(model, pad_token_id, None)
    except RunFailed as error:
        return str(error)
    return ""


def _check_clipping(cohort: Cohort, mechanism: Mechanism, alone: dict[str, Tensor]) -> None:
    """Where nothing is clipped, and where about half of the examples are; of units also where all are."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in alone.values()]).norm(dim=0)
    drawn = FIRST_OF_UNITS if mechanism.unit_examples else SHARED_OUT
    places = SHARED_UNITS if mechanism.unit_examples else SHARED_OUT
    tight = (0.3 * float(norms.min()),) if mechanism.unit_examples else ()
    for bound in (HUGE, 0.7 * float(norms.mean()), *tight):
        clipping = replace(mechanism, noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=1)
        wanted = clipped(list(alone.values()), bound, mechanism.clipping, list(alone), mechanism.shares)
        sums = {n: [g[own].sum(dim=0) for own in places] for n, g in zip(alone, wanted, strict=True)}
        _compare("clipped sum", cohort.private(drawn, [clipping, clipping]), sums)
        within = [float((norms[own] <= bound).sum()) - len(own) / 2 for own in places]
        if clipping.quantile and cohort.counts.tolist() != within:
            _refuse("the count of norms is not that of its clients")


def _check_noise(cohort: Cohort, mechanism: Mechanism) -> None:
    """On nobody's data: each client's own law on each tensor, and never the same numbers twice.

    The second client has another noise and another norm, so that none takes another's, nor a power of it.
    """
    other = replace(
        mechanism,
        noise_multiplier=1.7 * mechanism.noise_multiplier,
        max_grad_norm=0.6 * mechanism.max_grad_norm,
    )
    both = [mechanism, other]
    draws: tuple[list[list[Tensor]], ...] = ([], [])
    names, seen = list(cohort.stacks.trained), set[tuple[float, ...]]()
    size = sum(cohort.stacks.values[name][0].numel() for name in names)
    for _ in range(max(2, math.ceil(plausible.NOISE_DRAWS / size))):
        released = cohort.private(NOBODY, both)
        for place, of_client in enumerate(draws):
            of_client.append([_flat(released[name][place]) for name in names])
            begins = [b for t in of_client[-1] if (b := beginning(t / both[place].noise_std))]
            if seen & set(begins) or len(set(begins)) < len(begins):
                _refuse("the same noise came twice")
            seen |= set(begins)
    for own, of_client in zip(both, draws, strict=True):
        if flaw := flaw_of_tensors(names, of_client, own.noise_std):
            _refuse(flaw)


def _flat(noise: Tensor) -> Tensor:
    return noise.flatten().to("cpu", torch.float64, copy=True)


def _two_clients(
    model: AdaptedModel, named: Named, examples: Examples, pad_token_id: int, mechanism: Mechanism | None
) -> Cohort:
    adapters, head = model.read()
    with_units = None
    if mechanism is not None and mechanism.unit_examples:
        with_units = replace(mechanism, unit_examples=len(EXAMPLES))  # room for all of a unit's
    factors = [name.rpartition(".") for name in named if name not in head]
    members = [
        Member(
            adapters=lora_set(adapters),
            head=head,
            trained=frozenset(letter for _, _, letter in factors),
            modules=frozenset(module for module, _, _ in factors),
            train_head=any(name in head for name in named),
            indices=own,
            steps=1,
            seed=number,
            mechanism=with_units,
        )
        for number, own in enumerate(SHARED_OUT)
    ]
    task = BatchSettings(examples=examples, pad_token_id=pad_token_id, config=TrainConfig(batch_size=1))
    return Cohort(model, members, task)


def _compare(
    what: str, found: dict[str, Tensor], wanted: dict[str, list[Tensor]], tolerance: float = TOLERANCE
) -> None:
    for name, of_clients in wanted.items():
        if name not in found or not _alike(found[name], of_clients, tolerance):
            _refuse(f"the {what} of {name} is not that of its clients")


def _alike(found: Tensor, wanted: Sequence[Tensor], tolerance: float) -> bool:
    return all(negligible(f - w, w, tolerance) for f, w in zip(found, wanted, strict=True))


def _refuse(reason: str) -> None:
    raise RunFailed(
        f"cohort self-test: {reason} on this model, nothing was trained; use engine.cohort-size = 1"
    )
