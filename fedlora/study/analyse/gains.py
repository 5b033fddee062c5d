"""What each client gains by a run: over a global model, and over what it reaches alone.

The accuracies are those on the test examples of the domains that a client holds, seed by seed; a gain is
their difference, a mean over the seeds that both have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedlora.server.personal import GLOBAL_BY_CLIENT, PERSONAL
from fedlora.server.records import BY_CLIENT, worst_decile
from fedlora.study.analyse.summary import Row
from strategies.registry import RULES

ByClient = dict[str, float]
ALONE = "local-only"
"""The strategy under which a client reaches what it reaches alone."""
GLOBAL = "fedavg"
"""The strategy whose global model the others' personal models are held against, where they have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gains:
    """Gains of one row's clients, by partition id in their order.

    Attributes:
        name: of the row.
        over: over what: ``global`` or ``alone``.
        by_client: in accuracy, not empty.
    """

    name: str
    over: str
    by_client: ByClient

    @property
    def mean(self) -> float:
        """Over the clients."""
        return fmean(self.by_client.values())

    @property
    def worst_decile(self) -> float:
        """The mean over the tenth of the clients that gain least."""
        return worst_decile(list(self.by_client.values()))


def gains(rows: Sequence[Row]) -> list[Gains]:
    """The gains of all rows, in their order; nothing of a row that has nothing to be held against.

    Held against are rows of the same setting, both with something hidden or neither. Of personal models the
    global one is the run's own, else that of ``fedavg``; a run of global models alone gains over
    ``local-only`` only.
    """
    found = []
    for row in rows:
        if row.strategy == ALONE or row.method == "centralised":
            continue
        peers = [r for r in rows if (r.setting, r.protected) == (row.setting, row.protected)]
        shared: Mapping[int, ByClient] = {seed: run[GLOBAL_BY_CLIENT] for seed, run in _personal(row).items()}
        if not shared and keeps_models(row):
            shared = _first(peers, GLOBAL)
        for over, held in (("global", shared), ("alone", _first(peers, ALONE))):
            differences = _differences(own_models(row), held)
            if differences:
                found.append(Gains(name=row.name, over=over, by_client=differences))
    return found


def _first(rows: Sequence[Row], strategy: str) -> Mapping[int, ByClient]:
    """Accuracies by seed of the first row of a strategy that is what its name says."""
    plain = [r for r in rows if r.strategy == strategy and not _personal(r)]
    fitting = [r for r in plain if strategy == ALONE or not keeps_models(r)]
    return own_models(fitting[0]) if fitting else {}


def keeps_models(row: Row) -> bool:
    """Whether clients keep something trained in place of a global model."""
    rule = RULES.get(row.strategy)
    return row.config.model.head == "local" or (rule is not None and rule.facts.own_models)


def _personal(row: Row) -> dict[int, dict[str, Any]]:
    """Figures of second adapters by seed."""
    return {run.seed: run.result[PERSONAL] for run in row.results if run.result.get(PERSONAL)}


def own_models(row: Row) -> dict[int, ByClient]:
    """Accuracy of each client's own model by seed: the personal one where there is one."""
    found = {run.seed: run.result.get(BY_CLIENT) or {} for run in row.results}
    return found | {seed: personal[BY_CLIENT] for seed, personal in _personal(row).items()}


def by_clients(mine: Row, theirs: Row) -> list[float]:
    """What a method's clients have more than the other's, a mean over those that both have, for each seed."""
    own, held = own_models(mine), own_models(theirs)
    pairs = [(own[seed], held[seed]) for seed in own if seed in held]
    return [
        fmean(one[client] - other[client] for client in common)
        for one, other in pairs
        if (common := one.keys() & other.keys())
    ]


def _differences(own: Mapping[int, ByClient], held: Mapping[int, ByClient]) -> ByClient:
    """Means over the seeds, for clients that both have."""
    values: dict[str, list[float]] = {}
    for seed in own.keys() & held.keys():
        for client in own[seed].keys() & held[seed].keys():
            values.setdefault(client, []).append(own[seed][client] - held[seed][client])
    return {client: fmean(values[client]) for client in sorted(values, key=int)}
