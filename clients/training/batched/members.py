"""One client of a cohort: what it starts from, what it trains, and its own streams of randomness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clients.training.batches import Indices, poisson_batches, shuffled_batches
from clients.training.canaries import Canaries, among
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_sgd import private_streams
from clients.training.followed_norm import FollowedNorm, followed
from clients.training.units import Units, open_units
from fedlora.config import TrainConfig
from fedlora.core.factors import AdapterSet, Tensors
from fedlora.core.seeding import derive, stream
from fedlora.core.state import RankRegularizer
from fedlora.data.examples import Examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A client of a cohort, as `AdaptedModel.load` and the one-by-one trainers would have it.

    Attributes:
        adapters: factors of one rank for every adapted layer, some of whose directions may rest.
        head: head tensors; those not given take their initial values.
        trained: the factors that it trains, a subset of {"A", "B", "R"}.
        modules: the layers whose factors it trains.
        train_head: whether it trains the head.
        tail: what it adds to its loss.
        control: what it takes off its gradients.
        beside: a second adapter, without a core, held as it is; None where there is none.
        indices: its examples.
        steps: optimiser steps, >= 1.
        seed: its own and its round's; ignored where the mechanism is secure.
        mechanism: what its private steps do; None where it trains without privacy.
        canaries: what an audit hides among its examples.
        sample_rate: probability with which an example is in a private batch; None: batch size / examples.
    """

    adapters: AdapterSet
    head: Tensors
    trained: frozenset[str]
    modules: frozenset[str]
    train_head: bool
    indices: Indices
    steps: int
    seed: int
    tail: RankRegularizer | None = None
    control: Mapping[str, Tensor] = field(default_factory=dict)
    beside: AdapterSet | None = None
    mechanism: Mechanism | None = None
    sample_rate: float | None = None
    canaries: Canaries | None = None

    @property
    def rank(self) -> int:
        return next(iter(self.adapters.values())).rank


@dataclass(slots=True)
class Streams:
    """Streams of a member, in the order in which the one-by-one trainer draws.

    Attributes:
        seed: of all of them.
        batches: the examples of each step.
        dropout: of the adapters' inputs.
        noise: of private steps, unless they are secure.
        drawn_from: number of examples, or units, and canaries that batches draw.
        rate: probability of each in a private batch.
        units: whose examples are drawn; None where each example is one.
        norm: to which gradients are clipped, where that goes on from step to step.
    """

    seed: int
    batches: Iterator[Indices]
    dropout: torch.Generator
    noise: torch.Generator
    drawn_from: int
    rate: float
    units: Units | None = None
    norm: FollowedNorm | None = None


def open_streams(member: Member, config: TrainConfig, device: torch.device, examples: Examples) -> Streams:
    """The member's streams at their beginning; canaries are numbered on from the examples."""
    seed, units, drawn, rate = member.seed, None, member.indices, 0.0
    if member.mechanism is None:
        batches = shuffled_batches(drawn, config.batch_size, member.steps, stream(seed, "batches"))
    else:
        seed, rng = private_streams(member.seed, secure=member.mechanism.secure)
        units = open_units(examples, member.indices, member.mechanism.unit_examples, seed)
        own = member.indices if units is None else units.everyone
        rate = config.batch_size / len(own) if member.sample_rate is None else member.sample_rate
        drawn = among(own, member.canaries, len(examples))
        batches = poisson_batches(drawn, rate, member.steps, rng)
    return Streams(
        seed=seed,
        batches=batches,
        dropout=torch.Generator(device).manual_seed(derive(seed, "dropout")),
        noise=torch.Generator(device).manual_seed(derive(seed, "noise")),
        drawn_from=len(drawn),
        rate=rate,
        units=units,
        norm=followed(member.mechanism, torch.Generator().manual_seed(derive(seed, "counts"))),
    )
