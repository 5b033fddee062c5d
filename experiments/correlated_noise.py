"""Client-level privacy: correlated noise beside independent noise at one epsilon, over 100 rounds.

A generated task: ten classes of Gaussian features, 500 clients with 40 examples each and unlike shares of
the classes, 50 of them in each round, in turns, so that a client is in ten rounds. Clients train the head, a
softmax regression of 330 numbers, by ten steps of gradient descent; sampler, noise, aggregation and server
optimiser are the project's own. All arms share rates and clipping norm and differ in the noise alone:

    none          no noise, no clipping: what there is to lose
    independent   each round's own noise, for ten rounds of the Gaussian mechanism
    banded b      the same z and the same epsilon, correlated over b rounds (`fedlora.privacy.banded`)
    amplified     independent noise for 100 rounds at a sample rate of 1/10: what secret Poisson sampling of
                  clients would allow, which nobody here can promise; cohorts are drawn anew each round
                  (of a fixed size all the same), as they are without noise

``python -m experiments.correlated_noise`` writes the figures, ``--table`` prints them.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch import Tensor

from experiments.marked import markdown
from fedlora.core.seeding import torch_stream
from fedlora.core.state import ClientSpec, ClientUpdate, ModuleSpec, Template
from fedlora.privacy.banded import square_root
from fedlora.privacy.calibration import calibrate_noise
from strategies.client_dp import ClientDP
from strategies.registry import make_rule
from strategies.sampling import Selection
from strategies.server_optimizer import ServerOptimizer

RESULTS = Path(__file__).parent / "published" / "correlated_noise.json"
ROUNDS, CLIENTS, ASKED, DELTA = 100, 500, 50, 1e-3
EPSILONS, SEEDS, SERVERS = (1.0, 4.0), tuple(range(1, 11)), ("none", "fedavgm")
ARMS = ("none", "independent", "banded 2", "banded 5", "banded 10", "amplified")
CLASSES, FEATURES, EXAMPLES, TEST, SPREAD = 10, 32, 40, 4000, 0.45
CLIPPING_NORM, RATE, STEPS, MOMENTUM = 0.5, 0.5, 10, 0.9
SERVER_RATE = {"none": 1.0, "fedavgm": 0.1}
"""With momentum a tenth: a round's mean counts ten times in the end."""


@dataclass(frozen=True, slots=True)
class Task:
    """Features and labels: of each client (client, example, ..), and for the test."""

    features: Tensor
    labels: Tensor
    test_features: Tensor
    test_labels: Tensor


def task(seed: int) -> Task:
    """Classes around random centres; a client's shares of the classes are uniform numbers to the fourth."""
    g = torch_stream(seed, "correlated-noise", "task")
    centres = SPREAD * torch.randn(CLASSES, FEATURES, generator=g)
    shares = torch.rand(CLIENTS, CLASSES, generator=g) ** 4
    labels = torch.multinomial(shares, EXAMPLES, replacement=True, generator=g)
    test_labels = torch.randint(CLASSES, (TEST,), generator=g)
    drawn = [centres[y] + torch.randn(*y.shape, FEATURES, generator=g) for y in (labels, test_labels)]
    return Task(drawn[0], labels, drawn[1], test_labels)


def trained(head: dict[str, Tensor], features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Heads of all clients (first dimension) after their local steps from one head."""
    weight, bias = (head[name].expand(len(features), *head[name].shape) for name in ("weight", "bias"))
    wanted = torch.nn.functional.one_hot(labels, CLASSES).to(weight.dtype)
    for _ in range(STEPS):
        logits = features @ weight.mT + bias[:, None]
        errors = (logits.softmax(dim=-1) - wanted) / labels.shape[1]
        weight, bias = weight - RATE * errors.mT @ features, bias - RATE * errors.sum(dim=1)
    return {"weight": weight, "bias": bias}


def mechanism_of(arm: str, epsilon: float, seed: int, momentum: float) -> ClientDP | None:
    """An arm's noise; None without privacy."""
    if arm == "none":
        return None
    bands = int(arm.partition(" ")[2] or 1)
    share, times = (ASKED / CLIENTS, ROUNDS) if arm == "amplified" else (1.0, ROUNDS * ASKED // CLIENTS)
    return ClientDP(
        clipping_norm=CLIPPING_NORM,
        noise_multiplier=calibrate_noise(epsilon, DELTA, share, times),
        seed=seed,
        coefficients=square_root(bands, momentum),
    )


def run(arm: str, epsilon: float, server: str, seed: int) -> dict[str, Any]:
    """Accuracy after the last round, and over the last ten."""
    data, momentum = task(seed), MOMENTUM if server == "fedavgm" else 0.0
    rule = make_rule(
        "head-only",
        optimizer=ServerOptimizer(name=server, learning_rate=SERVER_RATE[server], beta_1=momentum),
    )
    head = {"weight": torch.zeros(CLASSES, FEATURES), "bias": torch.zeros(CLASSES)}
    module = {"unused": ModuleSpec(out_features=1, in_features=1)}
    state = rule.init(Template(modules=module, rank=1, scaling=1.0, head=head), seed)
    mechanism = mechanism_of(arm, epsilon, seed, momentum)
    turns = 1 if arm in ("none", "amplified") else CLIENTS // ASKED
    selection = Selection(fraction_train=ASKED / CLIENTS, seed=seed, separation=turns, min_train_nodes=ASKED)
    accuracies = []
    for number in range(1, ROUNDS + 1):
        chosen = selection.choose(range(CLIENTS), number)
        sent = {p: rule.broadcast(state, ClientSpec(partition_id=p, rank=1, scaling=1.0)) for p in chosen}
        heads = trained(dict(state.head), data.features[chosen], data.labels[chosen])
        updates = [
            ClientUpdate(
                partition_id=partition,
                adapters=sent[partition].adapters,
                head={name: tensors[row] for name, tensors in heads.items()},
                weight=1.0,
            )
            for row, partition in enumerate(chosen)
        ]
        if mechanism is not None:
            updates = mechanism.privatise(updates, sent, len(chosen), number)
        state, _ = rule.aggregate(state, updates, diagnostics=False)
        logits = data.test_features @ state.head["weight"].T + state.head["bias"]
        accuracies.append(float((logits.argmax(dim=1) == data.test_labels).double().mean()))
    return {
        "arm": arm, "epsilon": epsilon, "server": server, "seed": seed,
        "noise": None if mechanism is None else round(mechanism.noise_multiplier, 4),
        "asked_most": max(selection.participations.values()),
        "accuracy": round(accuracies[-1], 5),
        "last_ten": round(statistics.mean(accuracies[-10:]), 5),
    }  # fmt: skip


def cells() -> Iterator[tuple[str, float, str, int]]:
    """All of them; without privacy epsilon says nothing and is repeated."""
    for server in SERVERS:
        for epsilon in EPSILONS:
            yield from ((arm, epsilon, server, seed) for arm in ARMS for seed in SEEDS)


def table(found: list[dict[str, Any]]) -> str:
    """Mean accuracy after the last round by arm, and its distance to independent noise, paired by seeds."""
    rows = []
    for server in SERVERS:
        for epsilon in EPSILONS:
            setting = [c for c in found if (c["epsilon"], c["server"]) == (epsilon, server)]
            own = {arm: {c["seed"]: c for c in setting if c["arm"] == arm} for arm in ARMS}
            for arm in ARMS:
                cells = own[arm].values()
                noise = next(iter(cells))["noise"]
                z = "" if noise is None else f"{noise:.2f}"
                mean = f"{100 * statistics.mean(c['accuracy'] for c in cells):.1f} %"
                apart = "" if arm == "independent" else _apart(own[arm], own["independent"])
                rows.append([server, f"{epsilon:g}", arm, z, mean, apart])
    seeds = len({c["seed"] for c in found})
    return markdown(
        ["server", "epsilon", "noise", "z", f"accuracy, {seeds} seeds", "points beside independent, 95 %"],
        rows,
    )


def _apart(own: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> str:
    apart = [100 * (own[seed]["accuracy"] - other[seed]["accuracy"]) for seed in sorted(own)]
    width = student.ppf(0.975, len(apart) - 1) * statistics.stdev(apart) / len(apart) ** 0.5
    mean = statistics.mean(apart)
    return f"{mean:+.1f} ({mean - width:+.1f} to {mean + width:+.1f})"


if __name__ == "__main__":
    if "--table" not in sys.argv:
        lines = [json.dumps(run(*cell)) for cell in cells()]
        RESULTS.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(table(json.loads(RESULTS.read_text())))
