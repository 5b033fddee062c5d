"""A small adapter and the bits of a strategy, for the tests of the federation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from flwr.app import ArrayRecord

from fedlora import wire
from fedlora.core.factors import LoraFactors
from strategies.flower import FactorStrategy
from strategies.registry import RULES
from strategies.report import RoundReport

MODULES = {"encoder.q": (12, 8), "encoder.v": (6, 10)}
ANY_CHANGE = [name for name, codec in wire.CODECS.items() if not codec.of_steps]
"""Codecs that write down whatever a client made of its tensors."""
RULES_AND_CODECS = [
    (name, upload)
    for name in RULES
    for upload in ANY_CHANGE
    if upload in ("int4", "segments") or name in ("fedavg", "flora", "fedsa")
]
"""Every rule with a dense and a sparse codec, every codec with rules of each kind: none knows the other."""


def initial_arrays(rank: int = 3) -> ArrayRecord:
    g = torch.Generator().manual_seed(0)
    adapters = {
        name: LoraFactors(torch.randn(rank, i, generator=g), torch.zeros(o, rank), 2.0)
        for name, (o, i) in MODULES.items()
    }
    return wire.to_record(wire.to_peft(adapters, {"classifier.weight": torch.zeros(2, 6)}))


def bits(strategy: FactorStrategy) -> dict[str, bytes]:
    state = strategy.state
    assert state is not None
    tensors = wire.to_peft(state.adapters, state.head)
    for version, patch in enumerate(state.base):
        tensors |= {f"{version}/{name}": t for name, t in patch.tensors().items()}
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


def watched(strategy: FactorStrategy) -> list[RoundReport]:
    """The reports of a strategy's rounds, as they come."""
    seen: list[RoundReport] = []
    rounds = strategy.rounds

    def watching(*arguments: Any, **named: Any) -> Iterator[RoundReport]:
        for report in rounds(*arguments, **named):
            seen.append(report)
            yield report

    strategy.rounds = watching  # type: ignore[method-assign]
    return seen
