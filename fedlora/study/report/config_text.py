"""What the runs of a study share, how each differs, and what they ran on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config import FlatConfig, PrivacyConfig, RunConfig, Scalar, from_flat, to_flat
from fedlora.config.privacy import ADD_OR_REMOVE_ONE
from fedlora.data.columns import BY_NATURE
from fedlora.server.identity import NO_EFFECT, code_of
from fedlora.study.analyse.results import TAKEN_FROM, CellResult
from fedlora.study.analyse.summary import Row
from fedlora.study.report import format
from fedlora.study.report.format import significant

NOT_A_SETTING = ("seed", "strategy.name", *NO_EFFECT)
"""Keys that the report shows elsewhere or that change no result."""
OF_ONE_RUN = ("seed", "identity", TAKEN_FROM)
"""What stands in a provenance and is not shown with what the run ran on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What some runs ran on, and which runs."""

    facts: tuple[tuple[str, str], ...]
    labels: tuple[str, ...]


def shared_config(rows: Sequence[Row]) -> FlatConfig:
    """The commonest value of each key over the rows; of equally common ones the first.

    References are asked only where there is nothing else.
    """
    federated = [row for row in rows if row.kind != "reference"]
    flats = [to_flat(row.config) for row in federated or rows]
    return {key: Counter(flat[key] for flat in flats).most_common(1)[0][0] for key in flats[0]}


def differences(config: RunConfig, shared: FlatConfig) -> list[tuple[str, Scalar]]:
    """The keys, with values, in which one run departs from what is shared."""
    return [
        (key, value)
        for key, value in to_flat(config).items()
        if value != shared[key] and not key.startswith(NOT_A_SETTING)
    ]


def setting(rows: Sequence[Row], shared: FlatConfig) -> list[tuple[str, str]]:
    """Name and description of what the runs share, in words."""
    config = from_flat(shared)
    runs = [r for row in rows if row.kind != "reference" for r in row.results]
    clients = {p for r in runs for record in r.rounds for p in record["participants"]}
    labels = rows[0].results[0].result.get("labels") or []
    facts = [
        ("Model", _model(config, rows[0])),
        ("Adapter", _adapter(config)),
        ("Data", f"{config.data.name}, {_labels(labels)}at most {config.data.max_length} tokens"),
        ("Clients", f"{len(clients)} took part, data divided {_partitioning(config)}"),
        ("Rounds", f"{config.num_server_rounds}, {_participation(config)} in each"),
        ("Local work", _local_work(config)),
        ("Evaluation", _evaluation(config, rows[0].examples)),
        ("Each client", _each_client(config, rows)),
        ("Seeds", ", ".join(map(str, rows[0].seeds))),
    ]  # fmt: skip
    private = [row.config for row in rows if row.private]
    return [*facts, ("Privacy", _privacy(private))] if private else facts


HEADS = {
    "train": "the classification head is trained and averaged",
    "freeze": "the classification head is random and frozen",
    "local": "each client trains a classification head of its own",
}


def _model(config: RunConfig, row: Row) -> str:
    if row.unit == "token":
        return f"{config.model.name}, task {config.task}"
    return f"{config.model.name}, pooling {config.model.pooling}, {HEADS[config.model.head]}"


def _labels(labels: Sequence[object]) -> str:
    return f"{len(labels)} labels ({', '.join(map(str, labels))}), " if labels else ""


def _adapter(config: RunConfig) -> str:
    lora = config.lora
    rank = f"ranks {lora.ranks}" if lora.ranks else f"rank {lora.rank}"
    where = lora.target_modules or "PEFT's usual modules for this architecture"
    stabilised = ", rank-stabilised" if lora.use_rslora else ""
    return f"LoRA, {rank}, alpha {lora.alpha:g}, on {where}{stabilised}"


def _participation(config: RunConfig) -> str:
    return "every client" if config.fraction_train == 1 else f"{config.fraction_train:.0%} of the clients"


def _partitioning(config: RunConfig) -> str:
    data = config.data
    about = {
        "natural": f"by {data.partition_by}",
        "natural-dirichlet": f"by {data.partition_by}, and within it with Dirichlet label skew, "
        f"concentration {data.dirichlet_alpha:g}",
        "iid": "evenly at random",
        "dirichlet": f"with Dirichlet label skew, concentration {data.dirichlet_alpha:g}",
        "pathological": f"by label, {data.classes_per_partition} for each client",
        "shard": "in shards of sorted labels",
    }
    return about.get(data.partitioner, f"evenly at random in {data.partitioner} sizes")


def _local_work(config: RunConfig) -> str:
    train = config.train
    amount = f"{train.local_epochs} epochs" if train.local_epochs else f"{train.local_steps} steps"
    rate = f"learning rate {train.learning_rate:g}"
    return f"{amount} of {train.batch_size} examples, {train.optimizer}, {rate}"


def _privacy(configs: Sequence[RunConfig]) -> str:
    described = []
    for p in (config.privacy for config in configs):
        noise = f"noise multiplier {p.noise_multiplier:g}" if p.noise_multiplier else (
            f"noise calibrated to epsilon {p.target_epsilon:g}"
        )  # fmt: skip
        described.append(
            f"DP-SGD at each client with Poisson batches, gradients clipped to {p.max_grad_norm:g}, {noise} "
            f"at delta {significant(p.target_delta)} for the whole run, {p.accountant.upper()} accountant; "
            f"neighbouring datasets differ by one example of one client, {_neighbours(p)}"
        )
    return "; or ".join(dict.fromkeys(described))


def _neighbours(privacy: PrivacyConfig) -> str:
    if privacy.neighboring_relation == ADD_OR_REMOVE_ONE:
        return f"added or removed, at a declared count of {privacy.declared_examples:,} examples"
    return "replaced by nothing, the count of examples being public"


def _evaluation(config: RunConfig, examples: int) -> str:
    every, subset = config.evaluate_every, config.data.evaluate_examples
    when = "after each round" if every == 1 else f"every {every} rounds"
    which = f"{subset:,} of them" if 0 < subset < examples else "all of them"
    return f"{examples:,} test examples at the end, {which} {when}"


def _each_client(config: RunConfig, rows: Sequence[Row]) -> str:
    """What the figures of single clients are taken on, or why there are none."""
    if any(row.worst_client for row in rows if row.kind != "reference"):
        return (
            "the same final model on the test examples of the domains that a client holds; the worst decile "
            "is the mean over the tenth of the clients that fare worst, at least one"
        )
    if config.data.partitioner not in BY_NATURE:
        divided = _partitioning(config)
        return f"no figures: with data divided {divided}, clients have no test examples of their own"
    return "no figures: clients do not differ in their domains, or the runs are older than these figures"


def learning_rates(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Run, learning rate of adapter and head, optimiser, steps, batch: a line for each row."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        train = row.config.train
        head = f"{train.head_learning_rate:g}" if train.head_learning_rate else "the same"
        work = f"{train.local_epochs} epochs" if train.local_epochs else str(train.local_steps)
        rate, batch = f"{train.learning_rate:g}", str(train.batch_size)
        lines.append((row.name, rate, head, train.optimizer, work, batch))
    return lines


def provenances(results: Sequence[CellResult]) -> list[Provenance]:
    """Versions, code and machine, once for all runs that share them."""
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for result in results:
        groups.setdefault(_facts(result.provenance), []).append(result.label)
    return [Provenance(facts=facts, labels=tuple(labels)) for facts, labels in groups.items()]


def origins(results: Sequence[CellResult]) -> list[str]:
    """What a reader must know of where runs come from: more than one version of the code, other studies."""
    said = []
    codes = Counter(code_of(result.provenance) for result in results)
    if len(codes) > 1:
        listed = format.listed([f"{code}: {number}" for code, number in codes.items()])
        said.append(
            f"These runs come from {len(codes)} versions of the code ({listed}): what differs between two of "
            "them may be the code."
        )
    taken = Counter(
        str(origin).partition("/")[0] for r in results if (origin := r.provenance.get(TAKEN_FROM))
    )
    if taken:
        listed = format.listed([f"{number} of {study}" for study, number in taken.items()])
        said.append(f"Taken over, because the same configuration had run with the same code: {listed}.")
    return said


def _facts(provenance: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    facts = {key: value for key, value in provenance.items() if key not in OF_ONE_RUN}
    packages = facts.pop("packages", None)
    if isinstance(packages, dict):
        facts |= packages
    facts["code"] = code_of(provenance)
    return tuple((key, "unknown" if value is None else str(value)) for key, value in facts.items())
