"""A rule: how the server turns the clients' adapters into the next global adapter.

Every rule answers one question for each adapted layer. The clients' mean asks for

    T = sum_k p_k s_k B_k A_k            (held as stacked factors, never as a matrix)

and the rule chooses (1) the adapter (A', B') that the clients start from next, and (2) the fate of
the remainder ``T - s B' A'``: dropped, or added to the base weight. `Rule.merge` is that choice;
everything around it (weights, order, head, diagnostics) is shared here.

Rules are pure: state in, state out, inputs untouched, no I/O, no global randomness.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from fedlora.errors import ConfigError, FactorShapeError
from fedlora.factors import LoraFactors, Product, Tensors, check_same_modules, resize
from fedlora.initial import INIT_A, fresh_adapters
from fedlora.updates import FACTORS, Broadcast, ClientSpec, ClientUpdate, Patch, State, Template
from strategies.diagnostics import Diagnostics, diagnose


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is true of a rule; tests, tables and refusals are derived from it.

    Attributes:
        name: the key of ``strategy.name``.
        title: the name in the paper.
        paper: citation.
        trains: the factors that clients train.
        ships: the trained factors that come back.
        exact: the effective global weight after a round is W_before + sum_k p_k dW_k.
        mixed_ranks: clients may have different ranks.
        moves_base: the rule adds patches to the base weights.
        client_dp: client-level DP is sound (the aggregate is a mean of what is shipped).
        secure_sum: the server only needs sums of what is shipped.
        up, down: numbers per layer, round and client; r rank, R sum of ranks, o out, i in.
    """

    name: str
    title: str
    paper: str
    trains: frozenset[str] = FACTORS
    ships: frozenset[str] = FACTORS
    exact: bool
    mixed_ranks: bool = False
    moves_base: bool = False
    client_dp: bool
    secure_sum: bool
    up: str
    down: str

    @property
    def personal(self) -> bool:
        """Clients keep a trained factor to themselves: there is no global model."""
        return not self.trains <= self.ships


@dataclass(frozen=True, slots=True)
class Weighted:
    """One client's factors of one layer with its normalised weight p_k."""

    weight: float
    factors: LoraFactors


@dataclass(frozen=True, slots=True)
class Merged:
    """A layer after aggregation: the next adapter, and what moves into the base."""

    adapter: LoraFactors
    into_base: Product | None = None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules. A subclass declares ``facts`` and defines `merge`.

    Attributes:
        init_a: how the first A is drawn, ``kaiming`` or ``orthonormal``.

    Raises:
        ConfigError: an option outside what the rule accepts.
    """

    facts: ClassVar[Facts]
    init_a: str = "kaiming"

    def __post_init__(self) -> None:
        if self.init_a not in INIT_A:
            raise ConfigError(f"strategy.init-a = {self.init_a!r}: accepted are {', '.join(INIT_A)}")

    def merge(self, start: LoraFactors, clients: Sequence[Weighted], server_round: int) -> Merged:
        """One layer's aggregation.

        Args:
            start: the global factors before the round.
            clients: the clients' factors, in partition order, weights summing to 1.
            server_round: the round that is being aggregated, from 1.
        """
        raise NotImplementedError

    def init(self, template: Template, seed: int) -> State:
        """The state before round 1: the given adapter, or A drawn and B = 0."""
        adapters = template.adapters or fresh_adapters(
            template.modules, template.rank, template.scaling, seed, self.init_a
        )
        return State(round=0, adapters=dict(adapters), head=dict(template.head), seed=seed)

    def broadcast(self, state: State, client: ClientSpec) -> Broadcast:
        """What this client starts the next round from: the global adapter at its rank and scaling."""
        return Broadcast(
            adapters={name: _at_rank(factors, client) for name, factors in state.adapters.items()},
            trains=self.facts.trains,
            ships=self.facts.ships,
            modules=trained_modules(state, client),
            head=state.head,
        )

    def aggregate(self, state: State, updates: Iterable[ClientUpdate]) -> tuple[State, Diagnostics]:
        """One round: normalise weights, merge layer by layer in partition order, measure the gap.

        A client of weight zero is checked, then left out altogether, whatever its tensors hold.

        Raises:
            FactorShapeError: unequal ranks under a rule without mixed ranks, foreign modules or head.
            ConfigError: no update, two of one client, a negative weight, or weights that sum to zero.
        """
        received = sorted(updates, key=lambda update: update.partition_id)
        for update in received:
            self._check(state, update)
        shares = [(p, u) for p, u in zip(normalised(received), received, strict=True) if p > 0]
        weights, ordered = [p for p, _ in shares], [update for _, update in shares]
        merged: dict[str, Merged] = {}
        for name, start in state.adapters.items():
            clients = [
                Weighted(weight, update.adapters[name])
                for weight, update in zip(weights, ordered, strict=True)
            ]
            merged[name] = self.merge(start, clients, state.round + 1)
        moved = {name: m.into_base for name, m in merged.items() if m.into_base is not None}
        after = replace(
            state,
            round=state.round + 1,
            adapters={name: m.adapter for name, m in merged.items()},
            head=mean_head(state.head, ordered, weights),
            base=(*state.base, Patch(moved)) if moved else state.base,
        )
        return after, diagnose(state, after, ordered, weights)

    def _check(self, state: State, update: ClientUpdate) -> None:
        who = f"round {state.round + 1}, partition {update.partition_id}"
        check_same_modules(state.adapters, update.adapters, who)
        for name, start in state.adapters.items():
            given = update.adapters[name]
            shape, expected = (given.out_features, given.in_features), (start.out_features, start.in_features)
            if shape != expected:
                raise FactorShapeError(f"{who}, {name}: the layer is {shape}, expected {expected}")
            if given.rank != start.rank and not self.facts.mixed_ranks:
                raise FactorShapeError(
                    f"{who}, {name}: A has rank {given.rank}, expected {start.rank}; "
                    f"{self.facts.name} needs equal ranks"
                )


def trained_modules(state: State, client: ClientSpec) -> frozenset[str]:
    """The client's own target modules, or all of them."""
    everything = frozenset(state.adapters)
    return everything if client.modules is None else everything & client.modules


def normalised(updates: Sequence[ClientUpdate]) -> list[float]:
    """Weights p_k that sum to 1.

    Raises:
        ConfigError: nothing to average, two updates of one client, a negative or non-finite weight,
            or a total that is zero or overflows.
    """
    if not updates:
        raise ConfigError("there is no update to aggregate")
    replies = Counter(update.partition_id for update in updates)
    for update in updates:
        if replies[update.partition_id] > 1:
            raise ConfigError(f"partition {update.partition_id} sent more than one update for the round")
        if not (math.isfinite(update.weight) and update.weight >= 0):
            raise ConfigError(
                f"partition {update.partition_id}: weight {update.weight} must be finite and >= 0"
            )
    total = sum(update.weight for update in updates)
    if not 0 < total < math.inf:
        raise ConfigError(f"the weights of all updates sum to {total:g}: nothing can be averaged")
    return [update.weight / total for update in updates]


def weighted_sum(weights: Iterable[float], tensors: Iterable[Tensor]) -> Tensor:
    """``sum_k w_k X_k``, added in the given order."""
    total: Tensor | None = None
    for weight, tensor in zip(weights, tensors, strict=True):
        total = weight * tensor if total is None else total + weight * tensor
    if total is None:
        raise ConfigError("there is no tensor to average")
    return total


def mean_a(clients: Sequence[Weighted]) -> Tensor:
    """``sum_k p_k A_k``, (r, in)."""
    return weighted_sum((c.weight for c in clients), (c.factors.A for c in clients))


def mean_b(clients: Sequence[Weighted], scaling: float) -> Tensor:
    """``sum_k p_k (s_k / s) B_k``, (out, r): unequal scalings are folded into B."""
    return weighted_sum(
        (c.weight * (c.factors.scaling / scaling) for c in clients), (c.factors.B for c in clients)
    )


def mean_head(head: Tensors, updates: Sequence[ClientUpdate], weights: Sequence[float]) -> Tensors:
    """The head averaged with p_k; tensors that nobody ships stay as they are.

    Raises:
        FactorShapeError: a tensor that the head lacks or that only some clients ship, or another shape.
    """
    averaged = dict(head)
    for name in sorted({name for update in updates for name in update.head}):
        expected = _shape(head, name)
        for update in updates:
            if (given := _shape(update.head, name)) != expected:
                who = f"partition {update.partition_id}, head tensor {name}"
                raise FactorShapeError(f"{who}: {given}, expected {expected}")
        averaged[name] = weighted_sum(weights, (update.head[name] for update in updates))
    return averaged


def _shape(tensors: Tensors, name: str) -> str:
    return str(tuple(tensors[name].shape)) if name in tensors else "nothing"


def _at_rank(factors: LoraFactors, client: ClientSpec) -> LoraFactors:
    if factors.rank == client.rank and factors.scaling == client.scaling:
        return factors
    return resize(factors, client.rank, client.scaling)
