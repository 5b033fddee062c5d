"""One figure of `experiments.benchmarks.aggregate`, in this process; prints a JSON object."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from experiments.benchmarks.naive import NAIVE
from fedlora.core.factors import LoraFactors
from fedlora.core.seeding import torch_stream
from fedlora.core.state import Broadcast, ClientSpec, ClientUpdate, ModuleSpec, State, Template
from strategies.registry import make_rule
from strategies.rule import Rule
from strategies.streaming import aggregate_stream, streams

LARGE = 100
"""With more clients than this, only the step itself is measured."""


def main() -> None:
    """``aggregate_cell step|naive METHOD SHAPE``."""
    kind, name, shape = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    print(json.dumps(NAIVE[name](shape) if kind == "naive" else step(name, shape)))


def step(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the server step, with and without diagnostics, and peak memory."""
    rule = make_rule(name)
    before = _resident()
    state = _start(rule, shape)
    few = shape["clients"] <= LARGE
    measured: dict[str, Any] = {}
    if streams(rule) and few:
        aggregate_stream(rule, state, _updates(rule, state, shape))
        measured["streamed_memory_bytes"] = _peak() - before
    updates = list(_updates(rule, state, shape))
    factors = sum(_nbytes(u, rule, state) for u in updates)
    rule.aggregate(state, updates[:1], diagnostics=False)  # warm up
    measured["seconds"] = _best(lambda: rule.aggregate(state, updates, diagnostics=False), 3 if few else 1)
    measured["memory_bytes"] = _peak() - before
    measured["memory_ratio"] = measured["memory_bytes"] / factors
    if few:
        measured["seconds_with_diagnostics"] = _best(lambda: rule.aggregate(state, updates), 2)
    if "streamed_memory_bytes" in measured:
        measured["streamed_memory_ratio"] = measured["streamed_memory_bytes"] / factors
    return {**measured, "factor_bytes": factors, "threads": os.cpu_count()}


def _start(rule: Rule, shape: dict[str, Any]) -> State:
    """A rule's state in the middle of a run: B is not zero."""
    spec = ModuleSpec(out_features=shape["size"], in_features=shape["size"])
    names = [f"layers.{i}" for i in range(shape["modules"])]
    rank = max(shape["ranks"])
    state = rule.init(Template(modules=dict.fromkeys(names, spec), rank=rank, scaling=2.0), 0)
    for name, factors in state.adapters.items():
        factors.B.normal_(0, 0.01, generator=torch_stream(0, "B", name))
    return state


def _updates(rule: Rule, state: State, shape: dict[str, Any]) -> Iterator[ClientUpdate]:
    for client in range(shape["clients"]):
        rank = shape["ranks"][client % len(shape["ranks"])]
        given = rule.broadcast(state, ClientSpec(partition_id=client, rank=rank, scaling=2.0))
        yield ClientUpdate(
            partition_id=client,
            adapters={name: _moved(given, name, client) for name in given.adapters},
            head={},
            weight=float(client + 1),
        )


def _moved(given: Broadcast, name: str, client: int) -> LoraFactors:
    start = given.adapters[name]
    generator = torch_stream(1, name, client)
    moved = {
        factor: t + 0.01 * torch.randn(t.shape, generator=generator) if factor in given.trained else t
        for factor, t in start.tensors().items()
    }
    return LoraFactors(scaling=start.scaling, **moved)


def _nbytes(update: ClientUpdate, rule: Rule, state: State) -> int:
    """Bytes of both factors, whether shipped or not, of one client."""
    return sum(t.nbytes for f in update.adapters.values() for t in f.tensors().values())


def _best(run: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
