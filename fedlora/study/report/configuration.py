"""Configuration of a study: keys shared and not, rates and their trials, absent runs, provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config import FlatConfig, RunConfig, Scalar, to_flat
from fedlora.config.privacy import ADD_OR_REMOVE_ONE
from fedlora.server.identity import NO_EFFECT, code_of, recorded
from fedlora.study.analyse.results import TAKEN_FROM, CellResult
from fedlora.study.analyse.summary import Row
from fedlora.study.analyse.tuning import Tuning, epsilons
from fedlora.study.plan.absent import Absent
from fedlora.study.report.format import DASH, listed, shown
from fedlora.tasks.metrics import ACCURACY, Metric

NAME_INPUTS = ("data.", "model.", "lora.", "task", "seed", "privacy.unit-column", "devices.", "engine.cohort")
"""Beginnings of keys on which it rests what a run is given; with the same values it is the same."""
NOT_A_SETTING = ("seed", "strategy.name", *NO_EFFECT)
"""Keys that the report shows elsewhere or that change no result."""
RATES = {
    "train.learning-rate": "Learning rate", "train.head-learning-rate": "Of the head (0: the same)",
    "train.optimizer": "Optimiser", "train.local-steps": "Local steps",
    "train.local-epochs": "Local epochs (0: steps)", "train.batch-size": "Examples a step",
}  # fmt: skip
"""Keys that each run is shown with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of the page; without a body it is left out."""

    title: str
    header: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]
    note: str = ""


def shared_config(rows: Sequence[Row]) -> FlatConfig:
    """The commonest value of each key over the rows; of equally common ones the first.

    References are asked only where there is nothing else.
    """
    flats = [to_flat(row.config) for row in rows if row.kind != "reference"] or [to_flat(rows[0].config)]
    return {key: Counter(flat[key] for flat in flats).most_common(1)[0][0] for key in flats[0]}


def differences(config: RunConfig, shared: FlatConfig) -> list[tuple[str, Scalar]]:
    """The keys, with values, in which one run departs from what is shared."""
    return [
        (key, value)
        for key, value in to_flat(config).items()
        if value != shared[key] and not key.startswith(NOT_A_SETTING)
    ]


def facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Sizes of the study that no key says."""
    runs = [result for row in rows for result in row.results]
    rounds = [record for run in runs for record in run.rounds]
    evaluated = {f"{record['examples']:,}" for record in rounds if record.get("examples")}
    labels = rows[0].results[0].result.get("labels") or []
    seeds = sorted({seed for row in rows for seed in row.seeds})
    found = {
        "Seeds": ", ".join(map(str, seeds)),
        "Clients that took part": str(len({client for r in rounds for client in r["participants"]})),
        "Test examples": f"{rows[0].examples:,}",
        "Test examples in a round": " or ".join(sorted(evaluated)),
        "Neighbouring data sets": "; or ".join({_neighbours(r.config): None for r in rows if r.protected}),
        **_seen_by_less(runs),
        "Labels": f"{len(labels)} ({', '.join(map(str, labels))})" if labels else "",
    }  # fmt: skip
    return [(name, value) for name, value in found.items() if value]


SECOND = {
    "epsilon_of_model": "Epsilon against who sees the model alone",
    "epsilon_of_sums": "Epsilon against who sees sums alone",
}
"""A claim's second epsilon, see `clients.privacy.mechanism`."""


def _seen_by_less(runs: Sequence[CellResult]) -> dict[str, str]:
    claims = [run.result.get("claim", {}) for run in runs]
    most = {title: [c[key] for c in claims if key in c] for key, title in SECOND.items()}
    return {title: f"{max(found):.2f} at most" for title, found in most.items() if found}


def _neighbours(config: RunConfig) -> str:
    if config.privacy.client_level:
        bands = config.privacy.noise_bands
        drawn = f"correlated over {bands} rounds, of which a client is in one" if bands > 1 else "independent"
        if config.secure.noise != "none":
            drawn = f"shared by clients, that of {config.secure.honest} is counted on against the server"
        return f"differ by one client's updates, replaced by nothing; noise is {drawn}"
    column = config.privacy.unit_column
    units = "units" if column else "examples"
    hidden = (
        f"all examples of one unit (by {column}) at one client" if column else "one example of one client"
    )
    differ = f"replaced by nothing, the count of {units} being public"
    if config.privacy.neighboring_relation == ADD_OR_REMOVE_ONE:
        differ = f"added or removed, at a declared count of {config.privacy.declared_examples:,} {units}"
    return f"differ by {hidden}, {differ}"


Marked = tuple[str, bool]
"""A value as it is read, and whether it departs from what is shared."""


def differing(rows: Sequence[Row], shared: FlatConfig) -> tuple[list[str], list[tuple[str, list[Marked]]]]:
    """The keys in which rows differ, and the values of each row."""
    flats = {row.name: to_flat(row.config) for row in rows}
    keys = [key for key, _ in shared_keys(dict.fromkeys(shared, "shown"))]
    keys = [key for key in keys if len({flat[key] for flat in flats.values()}) > 1]
    return keys, [
        (name, [(str(flat[key]), flat[key] != shared[key]) for key in keys]) for name, flat in flats.items()
    ]


def shared_keys(shared: FlatConfig) -> list[tuple[str, Scalar]]:
    """Keys that all runs share, without those that are off."""
    return [(key, value) for key, value in shared.items() if value and not key.startswith(NOT_A_SETTING)]


def learning_rates(rows: Sequence[Row]) -> Table:
    """Training settings of each run, a line for each row."""
    configs = [(row.name, to_flat(row.config)) for row in rows]
    body = (
        (name, *(f"{v:g}" if isinstance(v := flat[key], float) else str(v) for key in RATES))
        for name, flat in configs
    )
    return Table(title="Learning rates", header=("Run", *RATES.values()), body=tuple(body))


def tuned(tuning: Tuning | None, rows: Sequence[Row]) -> Table:
    """Validation score of each group with each rate, the rate that was chosen, and what it all cost."""
    groups = tuning.groups if tuning else ()
    rates = sorted({rate for found in groups for rate in found.tried})
    note = ""
    if tuning:
        note = (
            f"Mean {_of(tuning.metric)} on a validation part, {100 * tuning.validation_fraction:g}% of the "
            f"training examples, held apart from those trials; seeds: {listed([*map(str, tuning.seeds)])}. "
            "What is reported has other seeds and trains on all. Of equals the smallest rate was chosen; at "
            "the edge: none beyond it was tried."
        )
    spent = {row.name: both for row in rows if tuning and (both := epsilons(tuning, row))}
    if tuning and spent:
        note = f"{note} {_of_the_choice(tuning)}"
    elif tuning and any(row.private for row in rows):
        note = f"{note} Tuning is outside epsilon."
    lines = []
    for found in groups:
        assert tuning is not None
        tried = ("failed" if a is None else shown(a, tuning.metric) for a in map(found.tried.get, rates))
        chosen = "none" if found.rate is None else f"{found.rate:g}{' (at the edge)' * found.at_the_edge}"
        lines.append((found.group, *tried, chosen, *_spent(spent, found.group)))
    header = ("Run", *(f"{rate:g}" for rate in rates), "Chosen", *(EPSILONS if spent else ()))
    return Table(title="How the learning rates were tuned", header=header, body=tuple(lines), note=note)


def _of(metric: Metric) -> str:
    return "accuracy" if metric is ACCURACY else f"{metric.title} (the {metric.best} is best)"


EPSILONS = ("Epsilon without the choice", "With it")


def _spent(spent: Mapping[str, tuple[float, float | None]], group: str) -> tuple[str, ...]:
    if not spent:
        return ()
    alone, whole = spent.get(group, (None, None))
    return tuple(DASH if epsilon is None else f"{epsilon:.2f}" for epsilon in (alone, whole))


def _of_the_choice(tuning: Tuning) -> str:
    said = (
        "Epsilon with the choice composes all trials of a run with the run itself; the table of all runs has "
        "the one without it."
    )
    if tuning.epsilon:
        return (
            f"{said} Accuracies have noise: the choice is {tuning.epsilon:g}-DP for an example of the "
            "validation part, which the trials did not train on."
        )
    return (
        f"{said} It is of the examples that the trials trained on: what the choice tells of the validation "
        "part is outside epsilon (study.tune-epsilon = 0)."
    )


def without_result(absent: Sequence[Absent], finished: int) -> Table:
    """Run, why it is not there, reason: what cannot exist once for all seeds, each failure by itself."""
    lines = [(a.group if a.why == "not applicable" else a.label, a.why, a.reason) for a in absent]
    counts = Counter(missing.why for missing in absent)
    said = listed([f"{number} {why}" for why, number in counts.items()])
    return Table(
        title="Runs without a result",
        header=("Run", "Why", "Reason"),
        body=tuple(dict.fromkeys(lines)),
        note=f"{finished} runs finished, {said}.",
    )


def provenances(results: Sequence[CellResult]) -> list[tuple[list[str], dict[str, Any]]]:
    """Versions, code and machine, with the runs that share them."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for result in results:
        found = {k: v for k, v in result.provenance.items() if k not in ("seed", "identity", TAKEN_FROM)}
        packages = found.pop("packages", None) or {}
        found |= {name: version or "not installed" for name, version in packages.items()}
        found["code"] = code_of(result.provenance)
        found["commit"] = found.get("commit") or "not from a git checkout"
        groups.setdefault(str(found), ([], found))[0].append(result.label)
    return list(groups.values())


def origins(results: Sequence[CellResult]) -> list[str]:
    """More than one version of the code, of data and weights under one name, and cells of other studies."""
    codes = Counter(code_of(result.provenance) for result in results)
    taken = Counter(str(o).partition("/")[0] for r in results if (o := r.provenance.get(TAKEN_FROM)))
    said = []
    if len(codes) > 1:
        counted = listed([f"{code}: {number}" for code, number in codes.items()])
        said.append(f"{len(codes)} versions of the code ({counted}): what differs may be the code.")
    if unlike := _unlike(results):
        said.append(
            f"Given other data, other weights or another kind of device than runs of the same seed and data "
            f"keys: {listed(unlike)}. What differs may be that."
        )
    if taken:
        counted = listed([f"{number} of {study}" for study, number in taken.items()])
        said.append(f"Taken over (same configuration, same code): {counted}.")
    return said


def _unlike(results: Sequence[CellResult]) -> list[str]:
    """Labels of runs whose inputs are not those of most others that name the same ones."""
    named: dict[str, list[tuple[str, str]]] = {}
    for result in results:
        found = recorded(result.provenance)
        if found is not None and found.inputs is not None:
            keys = {k: v for k, v in to_flat(result.config).items() if k.startswith(NAME_INPUTS)}
            named.setdefault(str(keys), []).append((result.label, found.inputs))
    unlike: list[str] = []
    for runs in named.values():
        most = Counter(inputs for _, inputs in runs).most_common(1)[0][0]
        unlike += [label for label, inputs in runs if inputs != most]
    return unlike
