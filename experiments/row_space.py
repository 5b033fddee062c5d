"""What a fixed row space costs, on a problem whose answer is known.

    python -m experiments.row_space

Four clients regress y = (W* + E_k) x on 64 inputs and outputs, W* of rank 8, E_k their own small
deviations, by gradient steps on B alone (rank 4) under the rules themselves. Printed is the relative error
||W* - W||_F / ||W*||_F. FFA and FedSVD cannot leave the 4 random directions of their first A; a variant can.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fedlora.core.adapters import as_lora
from fedlora.core.factors import LoraFactors
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State, Template
from strategies.registry import make_rule
from strategies.rule import Rule

SIZE, TRUE_RANK, RANK, CLIENTS, ROUNDS, STEPS, RATE = 64, 8, 4, 4, 60, 20, 0.1
RULES: tuple[tuple[str, dict[str, str]], ...] = (
    ("ffa", {"init_a": "orthonormal"}),
    ("fedsvd", {"init_a": "orthonormal"}),
    ("fedsvd-renew", {}),
)
RESULT = Path(__file__).parent / "published" / "adaptive" / "row_space.json"


def main() -> None:
    """All rules on three seeds."""
    found = {
        name: [round(error(make_rule(name, options), seed), 4) for seed in range(3)]
        for name, options in RULES
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    for name, errors in found.items():
        print(f"{name:14} {errors}")


def error(rule: Rule, seed: int) -> float:
    """The relative error of the global weight after all rounds."""
    wanted = _matrix(seed, "W", TRUE_RANK)
    own = [wanted + 0.1 * _matrix(seed, f"E{k}", TRUE_RANK) for k in range(CLIENTS)]
    spec = ModuleSpec(out_features=SIZE, in_features=SIZE)
    state = rule.init(Template(modules={"x": spec}, rank=RANK, scaling=1.0), seed)
    for _ in range(ROUNDS):
        base = sum((patch.products["x"].dense() for patch in state.base), start=torch.zeros(SIZE, SIZE))
        updates = [_trained(rule, state, k, own[k] - base) for k in range(CLIENTS)]
        state, _ = rule.aggregate(state, updates, diagnostics=False)
    base = sum((patch.products["x"].dense() for patch in state.base), start=torch.zeros(SIZE, SIZE))
    return float((wanted - base - as_lora(state.adapters["x"]).delta()).norm() / wanted.norm())


def _trained(rule: Rule, state: State, client: int, wanted: torch.Tensor) -> ClientUpdate:
    """Gradient steps on ``||wanted - B A||^2 / 2``, whitened inputs."""
    spec = ClientSpec(partition_id=client, rank=RANK, scaling=1.0)
    sent = as_lora(rule.broadcast(state, spec).adapters["x"])
    B = sent.B.clone()
    for _ in range(STEPS):
        B += RATE * (wanted - B @ sent.A) @ sent.A.T
    return ClientUpdate(partition_id=client, adapters={"x": LoraFactors(sent.A, B, 1.0)}, head={}, weight=1.0)


def _matrix(seed: int, name: str, rank: int) -> torch.Tensor:
    g = torch_stream(seed, "row-space", name)
    left, right = torch.randn(SIZE, rank, generator=g), torch.randn(rank, SIZE, generator=g)
    return torch.div(torch.mm(left, right), SIZE**0.5)


if __name__ == "__main__":
    main()
