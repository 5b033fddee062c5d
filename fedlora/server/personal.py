"""Figures of clients' own models, where a global one stands beside them: what each gains over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from clients.personal import GLOBAL_ACCURACY
from fedlora.server.records import BY_CLIENT, personal_summary, worst_decile
from fedlora.tasks import Task

PERSONAL = "personal"
"""Key of these figures in a record."""
GLOBAL_BY_CLIENT = "accuracy_of_global_by_client"


def second_summary(
    metrics: Mapping[int, Mapping[str, float]], domain_names: Sequence[str], task: Task
) -> dict[str, Any]:
    """Clients' evaluations as part of a record: their own models, the global one, and gains.

    The gain of a client is the accuracy of its own model less that of the global one, both on the test
    examples of the domains that it holds. Nothing where nobody told both.

    Args:
        metrics: by partition.
        domain_names: of the data.
        task: of the run.
    """
    wanted = {"accuracy", "loss", GLOBAL_ACCURACY}
    told = {p: m for p, m in metrics.items() if wanted <= m.keys()}
    if not told:
        return {}
    beside = {str(p): m[GLOBAL_ACCURACY] for p, m in sorted(told.items())}
    found = personal_summary(told, domain_names, task)
    gains = [found[BY_CLIENT][client] - beside[client] for client in beside]
    return {
        PERSONAL: {
            **found,
            GLOBAL_BY_CLIENT: beside,
            "gain_over_global": fmean(gains),
            "gain_over_global_worst_decile": worst_decile(gains),
        }
    }
