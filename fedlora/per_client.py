"""How the clients fare, each on test examples of its own: the domains that it holds.

Only where ``data.partitioner`` goes by nature do clients differ in their domains by design. Elsewhere every
client's test examples would be the same ones, and a figure for each of them an invention.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from clients.evaluation import Evaluation
from fedlora.data.columns import BY_NATURE
from fedlora.data.prepared import Prepared

BY_CLIENT = "accuracy_by_client"


def accuracy_by_client(
    outcome: Evaluation, data: Prepared, partitions: Collection[int], partitioner: str
) -> dict[str, float] | None:
    """Partition id -> accuracy of one model on the test examples of the domains that the client holds.

    A client whose domains have no test example is left out.

    Args:
        outcome: of the model on the whole test set.
        data: who holds which training examples, with the domain of each.
        partitions: the clients.
        partitioner: ``data.partitioner``.

    Returns:
        None where clients have no test examples of their own.
    """
    if partitioner not in BY_NATURE or not data.domain_names:
        return None
    held = {p: np.unique(data.train.domains[data.indices(p)]) for p in sorted(partitions)}
    if len({domains.tobytes() for domains in held.values()}) == 1:
        return None
    right, units = np.zeros((2, len(data.domain_names)), dtype=np.int64)
    for domain, results in outcome.by_domain().items():
        right[domain], units[domain] = results.right.sum(), results.units.sum()
    sums = {p: (int(right[domains].sum()), int(units[domains].sum())) for p, domains in held.items()}
    return {str(p): hits / count for p, (hits, count) in sums.items() if count} or None


def spread(accuracies: Mapping[str, float] | None) -> dict[str, Any]:
    """Part of a result record: all clients, the mean of the worst tenth, the worst; None where not known."""
    values = list((accuracies or {}).values())
    return {
        BY_CLIENT: accuracies or None,
        "accuracy_worst_decile": worst_decile(values) if values else None,
        "accuracy_worst_client": min(values, default=None),
    }


def worst_decile(accuracies: Sequence[float]) -> float:
    """The mean over the tenth of the clients (rounded up) with the lowest accuracy.

    >>> worst_decile([0.9] * 18 + [0.5, 0.7])
    0.6
    """
    lowest = sorted(accuracies)[: math.ceil(len(accuracies) / 10)]
    return math.fsum(lowest) / len(lowest)
