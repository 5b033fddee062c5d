"""Bytes that clients send for the accuracy of FedAvg, on a generated task.

    python -m experiments.uploads

Eight clients classify 64 random numbers into 10 classes with a frozen random network of two layers whose
weights LoRA of rank 8 adapts, as a teacher labels them: the network with changes of rank 4. Each client sees
inputs around a centre of its own, so that classes are spread unevenly. FedAvg, every client in every round,
AdamW; what differs is the codec alone. Accuracy is of 4,000 inputs from all centres; bytes are those of all
records that clients would send, counted by `fedlora.wire`. Tests and the rule for a verdict are those of
`fedlora.study.analyse.comparisons`: ten paired seeds, two one-sided t tests against one point, Holm.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora import wire
from fedlora.core.adapters import as_lora
from fedlora.core.factors import LoraFactors, Tensors
from fedlora.core.files import write_atomic
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, State, Template
from fedlora.study.analyse.comparisons import holm, paired
from strategies.registry import make_rule

INPUTS, HIDDEN, CLASSES, RANK, CLIENTS, EXAMPLES, TESTS = 64, 128, 10, 8, 8, 200, 4000
ROUNDS, STEPS, BATCH, RATE, SEEDS = 60, 5, 20, 0.003, tuple(range(1, 11))
MODULES = {
    "first": ModuleSpec(out_features=HIDDEN, in_features=INPUTS),
    "second": ModuleSpec(out_features=CLASSES, in_features=HIDDEN),
}
RESULT = Path(__file__).parent / "published" / "uploads" / "results.json"


@dataclass(frozen=True)
class Task:
    """One seed's network, teacher and examples."""

    seed: int

    def normal(self, name: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch_stream(self.seed, "uploads", name))

    def weights(self) -> Tensors:
        return {
            name: self.normal(name, m.out_features, m.in_features) / m.in_features**0.5
            for name, m in MODULES.items()
        }

    def teacher(self) -> Tensors:
        """The network with changes of rank 4 that are as large as its weights."""
        changed = Tensors()
        for name, weight in self.weights().items():
            left = self.normal(f"teacher's left of {name}", weight.shape[0], 4)
            right = self.normal(f"teacher's right of {name}", 4, weight.shape[1])
            change = left @ right
            changed[name] = weight + change * (weight.norm() / change.norm())
        return changed

    def inputs(self, client: int, count: int, what: str) -> Tensor:
        centre = 0.5 * self.normal(f"centre of {client}", INPUTS)
        return centre + self.normal(f"{what} of {client}", count, INPUTS)

    def labels(self, x: Tensor) -> Tensor:
        return outputs(self.teacher(), x).argmax(dim=1)


def outputs(weights: Tensors, x: Tensor) -> Tensor:
    """Logits of the network, (n, classes)."""
    return torch.relu(x @ weights["first"].T) @ weights["second"].T


def adapted(weights: Tensors, factors: dict[str, LoraFactors]) -> Tensors:
    """Weights with what the adapters change."""
    return {name: weight + factors[name].delta() for name, weight in weights.items()}


def trained(
    task: Task, start: dict[str, LoraFactors], client: int, server_round: int
) -> dict[str, LoraFactors]:
    """A client's factors after its steps of one round."""
    x = task.inputs(client, EXAMPLES, "examples")
    y, weights = task.labels(x), task.weights()
    own = {n: {k: t.clone().requires_grad_() for k, t in f.tensors().items()} for n, f in start.items()}
    optimiser = torch.optim.AdamW([t for tensors in own.values() for t in tensors.values()], lr=RATE)
    draws = torch_stream(task.seed, "batches", client, server_round)
    factors = {n: LoraFactors(**tensors, scaling=start[n].scaling) for n, tensors in own.items()}
    for _ in range(STEPS):
        chosen = torch.randperm(EXAMPLES, generator=draws)[:BATCH]
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(outputs(adapted(weights, factors), x[chosen]), y[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return {n: LoraFactors(f.A.detach(), f.B.detach(), f.scaling) for n, f in factors.items()}


def accuracy(task: Task, state: State) -> float:
    """Percent of the test inputs that get the teacher's class."""
    x = torch.cat([task.inputs(client, TESTS // CLIENTS, "tests") for client in range(CLIENTS)])
    weights = adapted(task.weights(), {n: as_lora(a) for n, a in state.adapters.items()})
    return 100 * float((outputs(weights, x).argmax(dim=1) == task.labels(x)).double().mean())


def run(upload: str, seed: int) -> tuple[float, int]:
    """Final accuracy in percent, and bytes that all clients have sent."""
    task, codec, rule = Task(seed), wire.codec_named(upload), make_rule("fedavg")
    state = rule.init(Template(modules=MODULES, rank=RANK, scaling=2.0), seed)
    owed, sent = {client: Tensors() for client in range(CLIENTS)}, 0
    for server_round in range(1, ROUNDS + 1):
        updates = []
        for client in range(CLIENTS):
            spec = ClientSpec(partition_id=client, rank=RANK, scaling=2.0)
            given = {n: as_lora(a) for n, a in rule.broadcast(state, spec).adapters.items()}
            start = wire.to_peft(given, {})
            new = wire.with_owed(wire.to_peft(trained(task, given, client, server_round), {}), owed[client])
            draws = torch_stream(seed, "upload", server_round, client)
            arrays = codec.encode(start, new, draws, server_round + client)
            sent += wire.nbytes(wire.to_record(arrays, None))
            told = codec.decode(start, arrays)
            if codec.feedback:
                owed[client] = {name: tensor - told[name] for name, tensor in new.items()}
            adapters = wire.from_peft(told).adapters(2.0, frozenset(), RANK)
            updates.append(ClientUpdate(partition_id=client, adapters=adapters, head={}, weight=1.0))
        state, _ = rule.aggregate(state, updates, diagnostics=False)
    return accuracy(task, state), sent


def main() -> None:
    """Every codec on all seeds; what is kept has a verdict against floats for each."""
    found: dict[str, dict[str, Any]] = {}
    for upload in wire.CODECS:
        results = [run(upload, seed) for seed in SEEDS]
        found[upload] = {
            "accuracy": [round(percent, 3) for percent, _ in results],
            "bytes_up": sum(sent for _, sent in results) // len(SEEDS),
        }
        print(upload, found[upload], flush=True)
    floats = found["float32"]
    pairs = [
        paired(
            name,
            "float32",
            [(mine - theirs) / 100 for mine, theirs in zip(own["accuracy"], floats["accuracy"], strict=True)],
        )
        for name, own in found.items()
        if name != "float32"
    ]
    for pair in holm(pairs):
        found[pair.method] |= {
            "share_of_float32": round(found[pair.method]["bytes_up"] / floats["bytes_up"], 4),
            "points_from_float32": round(100 * pair.mean.value, 2),
            "p_alike_holm": pair.p_alike_holm,
            "verdict": pair.verdict,
        }
        print(pair.method, {key: found[pair.method][key] for key in found[pair.method] if key != "accuracy"})
    write_atomic(RESULT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
