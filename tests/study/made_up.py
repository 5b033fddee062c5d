"""Made-up results with the schemas that runs write, for tests of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.config import Scalar, from_flat
from fedlora.core.seeding import stream
from fedlora.server.records import spread
from fedlora.study.analyse.results import CellResult
from fedlora.study.plan.cells import Kind

DOMAINS = {"amazon": 0.02, "movies": -0.03, "nyt": -0.05, "tweets": 0.06}
TEST_SIZE, EVALUATED = 2400, 600


def result(
    group: str,
    kind: Kind = "strategy",
    *,
    accuracy: float = 0.8,
    seed: int = 0,
    label: str | None = None,
    epsilon: float | None = None,
    keys: Mapping[str, Scalar] | None = None,
    setting: str = "",
    num_rounds: int = 10,
    record: Mapping[str, Any] | None = None,
    outcome: Mapping[str, Any] | None = None,
) -> CellResult:
    """One finished run whose strategy is ``group`` unless ``keys`` say otherwise.

    Under a setting, ``group`` is the method.
    """
    private: dict[str, Scalar] = {"privacy.mode": "example"} if epsilon else {}
    name = (
        {}
        if keys and "strategy.name" in keys
        else {"strategy.name": group if kind == "strategy" else "fedavg"}
    )
    config = from_flat({"seed": seed, "num-server-rounds": num_rounds, **name, **private, **(keys or {})})
    strategy = config.strategy.name
    spent = {str(k): (epsilon or 0.0) - 0.03 * k for k in range(4)} if epsilon else {}
    rounds = [
        {
            "round": number,
            "strategy": strategy,
            "accuracy": _learnt(accuracy, number / num_rounds, group, seed),
            "loss": 1.0 - accuracy / 2,
            "accuracy_by_domain": {},
            "examples": EVALUATED,
            "bytes_up": UP.get(strategy, 1_200_000),
            "bytes_down": DOWN.get(strategy, 1_200_000),
            "seconds": 3.2,
            "private": config.privacy.private,
            "epsilon": epsilon * math.sqrt(number / num_rounds) if epsilon else None,
            "epsilon_by_client": spent,
            "gap": GAP.get(strategy, 2e-7) * (1 + 0.3 * math.sin(number)),
            "cosine": 0.5 + 0.2 * math.sin(number),
            "effective_rank": 4.0 + number,
            "update_norm": 1.0,
            "train_loss": None if epsilon else 0.6,
            "participants": [0, 1, 2, 3],
            "refused": {},
            **(record or {}),
        }
        for number in range(1, num_rounds + 1)
    ]
    return CellResult(
        label=label or "-".join(filter(None, (group, setting))),
        kind=kind,
        seed=seed,
        group=f"{group}-{setting}" if setting else group,
        method=group,
        setting=setting,
        config=config,
        rounds=rounds,
        result={
            "strategy": strategy,
            "rounds": num_rounds,
            "accuracy": accuracy,
            "loss": 1.0 - accuracy / 2,
            "accuracy_by_domain": {d: min(1.0, accuracy + shift) for d, shift in DOMAINS.items()},
            "examples": TEST_SIZE,
            "majority_accuracy": 0.529,
            "epsilon": epsilon,
            "epsilon_by_client": spent,
            "bytes_up": sum(r["bytes_up"] for r in rounds),
            "bytes_down": sum(r["bytes_down"] for r in rounds),
            "seconds": 31.5,
            "peak_memory_bytes": 1_300_000_000,
            "labels": ["negative", "positive"],
            **(outcome or {}),
        },
        provenance={
            "seed": seed,
            "commit": "0123abc",
            "python": "3.11.2",
            "packages": {"fedlora": "0.1.0", "torch": "2.13.0"},
            "machine": "x86_64",
            "cpus": 2,
        },
    )


UP = {"head-only": 12_000, "ffa": 600_000, "flora": 1_190_000, "fedsvd": 610_000}
DOWN = {"head-only": 12_000, "ffa": 600_000, "flora": 4_700_000, "fedsvd": 1_190_000}
GAP = {"fedavg": 0.31, "lora-fair": 0.08, "head-only": 0.0}


def _learnt(accuracy: float, progress: float, group: str, seed: int) -> float:
    noise = stream(seed, "made-up", group, round(1000 * progress)).normal(0, 0.008)
    return float(0.52 + (accuracy - 0.52) * (1 - math.exp(-4 * progress)) + noise)


def study(seeds: Sequence[int] = (0,)) -> list[CellResult]:
    """Six strategies, both references, three private variants."""
    found = []
    for seed in seeds:
        ending = f"-seed-{seed}" if len(seeds) > 1 else ""
        for name, accuracy in STRATEGIES.items():
            keys: dict[str, Scalar] = {"train.learning-rate": 5e-3} if name in ("ffa", "fedsvd") else {}
            found.append(
                result(name, accuracy=_moved(accuracy, name, seed), seed=seed, label=name + ending, keys=keys)
            )
        everybody = _moved(0.846, "centralised", seed)
        found.append(
            result("centralised", "reference", accuracy=everybody, seed=seed, label=f"centralised{ending}")
        )
        for k in range(4):
            label, keys = f"local-only-{k}{ending}", {"partitions": str(k)}
            found.append(
                result("local-only", "reference", accuracy=0.69 + 0.02 * k, seed=seed, label=label, keys=keys)
            )
        found += [_private(name, accuracy, seed, ending) for name, accuracy in PRIVATE.items()]
    return found


def _private(strategy: str, accuracy: float, seed: int, ending: str) -> CellResult:
    group = f"{strategy}-private"
    refused = {"2": "the update holds <b>NaN</b>"} if strategy == "ffa" else {}
    return result(
        group,
        "variant",
        accuracy=_moved(accuracy, group, seed),
        seed=seed,
        label=group + ending,
        epsilon=7.94,
        keys={"strategy.name": strategy, "train.batch-size": 64},
        record={"refused": refused},
    )


def _moved(accuracy: float, group: str, seed: int) -> float:
    """Seed 0 has the accuracies as written, the others differ by about a point."""
    return accuracy + (float(stream(seed, "moved", group).normal(0, 0.01)) if seed else 0.0)


PRIVATE = {"fedavg": 0.701, "ffa": 0.738, "head-only": 0.729}
STRATEGIES = {
    "fedavg": 0.817, "ffa": 0.793, "flora": 0.803, "lora-fair": 0.829, "fedsvd": 0.515, "head-only": 0.781,
}  # fmt: skip


def large(methods: int = 10, settings: int = 5, seeds: int = 10) -> list[CellResult]:
    """As many runs as a large study has, each with clients and rounds of its own."""
    found = []
    for seed in range(1, seeds + 1):
        for place in range(settings):
            for number in range(methods):
                name, setting = f"method-{number}", f"setting-{place}"
                label = f"{name}-{setting}-seed-{seed}"
                moved = 0.6 + 0.02 * number - 0.03 * place + float(stream(seed, label).normal(0, 0.01))
                clients = {str(k): moved + 0.01 * (k - 10) for k in range(20)}
                found.append(
                    result(
                        name, "variant", accuracy=moved, seed=seed, label=label, setting=setting,
                        keys={"strategy.name": "fedavg", "train.learning-rate": 0.001 * (number + 1)},
                        outcome=spread(clients), num_rounds=20,
                    )
                )  # fmt: skip
    return found
