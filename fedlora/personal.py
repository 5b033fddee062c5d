"""Models of clients that keep trained tensors to themselves, out of their stores after a simulated run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from clients.holdings import OWN, Holdings
from fedlora.factors import Tensors
from fedlora.peft_keys import from_peft
from fedlora.updates import ClientSpec, State
from strategies.rule import at_rank


def own_tensors(store: Path, partitions: Iterable[int], last_round: int) -> dict[int, Tensors]:
    """What each client kept after its last round, in PEFT's spelling, without clients that never trained.

    Args:
        store: the run's directory among the clients' stores, ``<state-dir>/<run-key>``.
        partitions: whose.
        last_round: the last round that was aggregated.
    """
    holdings = Holdings(store)
    found = {p: holdings.personal(p, OWN, last_round + 1) for p in sorted(partitions)}
    return {p: tensors for p, tensors in found.items() if tensors is not None}


def model_of(state: State, own: Tensors, client: ClientSpec | None = None) -> State:
    """The global state, at a client's rank and scaling, with its own tensors in their place."""
    mine, adapters = from_peft(own), state.adapters
    if client is not None:
        adapters = {name: at_rank(factors, client) for name, factors in adapters.items()}
    return replace(state, adapters=mine.over(adapters), head={**state.head, **mine.head})


def mean_model(state: State, own: Mapping[int, Tensors], weights: Mapping[int, float]) -> State:
    """The global state with the weighted mean of what clients kept: a model for whom nobody trained.

    A tensor that only some clients have is averaged over those.
    """
    mean: Tensors = {}
    for name in sorted({name for tensors in own.values() for name in tensors}):
        having = [p for p in sorted(own) if name in own[p]]
        total = sum(weights[p] for p in having)
        mean[name] = torch.stack([weights[p] / total * own[p][name] for p in having]).sum(dim=0)
    return model_of(state, mean)
