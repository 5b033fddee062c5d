"""What a run is about to do, in a few lines: model, data, clients, traffic, privacy.

The same lines are shown by ``fedlora run --dry-run`` and at the start of every run in simulation. What a run
will take is in `fedlora.server.expected`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from clients.budget import noise_of, planned_steps, rate_of
from clients.privacy import mechanism_of
from clients.runtime import ClientRuntime, read_runtime
from clients.training.batches import num_steps
from fedlora import wire
from fedlora.config import DataConfig, PrivacyConfig, RunConfig
from fedlora.config.section import kebab
from fedlora.core.state import Broadcast, State
from fedlora.prepared.cache import Prepared
from fedlora.server.build import assemble, client_spec
from fedlora.server.secure import secure_line
from fedlora.server.validate import check
from strategies.rule import Rule
from strategies.sampling import clients_of_round
from strategies.sums import rows_of
from strategies.uploads import codec_of

Line = tuple[str, str]
MOST_NAMED = 8
"""Labels or clients that a line names; more are counted."""


@dataclass(frozen=True, slots=True)
class Preview:
    """A run before it begins.

    Attributes:
        config: of the run, checked.
        runtime: its model and data.
        rule: its strategy's.
        state: before the first of the rounds to come.
        partitions: the clients that may take part; None where nodes hold their data.
    """

    config: RunConfig
    runtime: ClientRuntime
    rule: Rule
    state: State
    partitions: Collection[int] | None

    def lines(self) -> list[Line]:
        """A heading and a sentence for each part."""
        return [
            ("model", self._model()),
            *data_lines(self.config, self.runtime.data, sorted(self.partitions or ())),
            ("training", self._training()),
            *([] if self.partitions is None else [("traffic", self._traffic())]),
            ("privacy", self._privacy()),
            *([("secure", secure_line(self.config, self.rule))] if self.config.secure.mode == "sums" else []),
        ]

    def _model(self) -> str:
        model, config = self.runtime.model, self.config
        total = sum(p.numel() for n, p in model.module.named_parameters() if ".lora_" not in n)
        kinds = sorted({name.rpartition(".")[2] for name in model.modules})
        return (
            f"{config.model.name} for {config.task}, {total / 1e6:.1f} M numbers; {config.lora.method} in "
            f"{len(model.modules)} layers ({', '.join(kinds)}), head: {config.model.head}"
        )

    def _training(self) -> str:
        config = self.config
        work = f"{config.train.local_steps} steps"
        if config.train.local_epochs:
            work = f"{config.train.local_epochs} epochs"
        done = f"; {self.state.round} of the rounds are done" if self.state.round else ""
        return (
            f"{self.rule.facts.name}, {config.num_server_rounds} rounds of {work} in batches of "
            f"{config.train.batch_size}, {config.train.optimizer} at {config.train.learning_rate:g}{done}"
        )

    def traffic(self) -> tuple[list[int], list[int]]:
        """Bytes up and bytes down of the first clients, at most `MOST_NAMED`, in their first round."""
        clients = sorted(self.partitions or ())
        rule, secure, ups, downs = self.rule, self.config.secure, [], []
        upload = codec_of(self.config.upload, rule, self.config.wire_dtype)
        specs = [
            client_spec(self.config, self.runtime, partition) for partition in clients[: self.in_a_round]
        ]
        sums = rows_of(rule, self.state, specs, secure.sketch_size) if secure.mode == "sums" else None
        for partition, began in zip(clients, map(self.broadcast, clients[:MOST_NAMED]), strict=False):
            given = self.config.train_of(partition), len(self.runtime.data.indices(partition))
            steps = num_steps(*given, self.config.local_steps_of(partition))
            layers = {name: adapter for name, adapter in began.adapters.items() if name in began.modules}
            head = began.head if self.config.model.head == "train" else {}
            up = wire.to_peft(layers, head, began.uploaded)
            down = wire.to_peft({} if began.fresh_seed is not None else began.adapters, began.head)
            plain = wire.most_bytes(upload, up, began.choose, steps)
            noisy = secure.noise == "distributed"
            row = 0 if sums is None else wire.row_length(sums.start(began), noisy=noisy) * secure.bits // 8
            ups.append(row or plain)
            moved = [wire.most_bytes(self.config.wire_dtype, patch.tensors()) for patch in self.state.base]
            downs.append(wire.most_bytes(self.config.wire_dtype, down) + sum(moved))
        return ups, downs

    @property
    def in_a_round(self) -> int:
        """How many clients a round asks."""
        return clients_of_round(
            self.config.fraction_train, len(self.partitions or ()), self.config.min_train_nodes
        )

    def _traffic(self) -> str:
        rule, (ups, downs) = self.rule, self.traffic()
        sketched = self.config.secure.mode == "sums" and rule.facts.sketched
        return (
            f"{_bytes(ups)} up and {_bytes(downs)} down for a client in its first round (numbers a layer: "
            f"up {'of sketches' if sketched else rule.facts.up or '0'}, "
            f"down {rule.facts.down or '0'})"
        )

    def _privacy(self) -> str:
        config, privacy = self.config, self.config.privacy
        if privacy.mode == "none":
            ignored = [
                f"privacy.{kebab(name)} = {getattr(privacy, name)}"
                for name in ("target_epsilon", "noise_multiplier")
                if getattr(privacy, name) != getattr(PrivacyConfig(), name)
            ]
            return (
                f"none, and {' and '.join(ignored)} without privacy.mode does nothing" if ignored else "none"
            )
        budget = mechanism_of(config).budget()
        said = f"{privacy.granularity} level, {budget}"
        if privacy.mode != "example" or self.partitions is None:
            return said
        rates = {
            partition: rate_of(config, partition, self.runtime.data.num_protected(partition))
            for partition in self.partitions
        }
        extremes = {min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)}
        noises = [noise_of(config, rates[p], config.local_steps_of(p)) for p in sorted(extremes)]
        steps = planned_steps(config, config.train.local_steps)
        return f"{said} for each client after at most {steps:,} steps; noise multiplier {_range(noises)}"

    def broadcast(self, partition: int) -> Broadcast:
        """What a client starts its first round from."""
        return self.rule.broadcast(self.state, client_spec(self.config, self.runtime, partition))


def _some(named: Sequence[str]) -> str:
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return ", ".join(named[:MOST_NAMED]) + more


def _range(values: Sequence[float]) -> str:
    """The smallest and the largest, or the one that all are.

    >>> _range([3, 1200]), _range([2.0, 2.0])
    ('3 to 1,200', '2')
    """
    low, high = (
        f"{value:,}" if isinstance(value, int) else f"{value:.3g}" for value in (min(values), max(values))
    )
    return low if low == high else f"{low} to {high}"


def _bytes(values: Sequence[float]) -> str:
    low, high = (f"{value / 1e6:.3g}" for value in (min(values), max(values)))
    return f"{low if low == high else f'{low} to {high}'} MB"


def data_lines(config: RunConfig, data: Prepared, clients: Sequence[int]) -> list[Line]:
    """Examples, labels and, where they are known, clients."""
    lines = [("data", _examples(config.data, data))]
    if data.train.targets is not None:
        lines.append(("targets", _some(_targets(data.label_names, data.train.targets))))
    elif data.num_labels:
        counts = np.bincount(data.train.labels, minlength=data.num_labels)
        named = [f"{name} {count:,}" for name, count in zip(data.label_names, counts, strict=True)]
        lines.append(("labels", _some(named)))
    return [*lines, ("clients", _clients(config, data, clients))] if clients else lines


def _targets(names: Sequence[str], targets: np.ndarray) -> list[str]:
    """Mean and standard deviation of each column; the mean of a label is its share."""
    moments = zip(names, targets.mean(axis=0), targets.std(axis=0), strict=True)
    return [f"{name} {mean:.3g} (sd {deviation:.3g})" for name, mean, deviation in moments]


def _examples(config: DataConfig, data: Prepared) -> str:
    said = f"{config.name}: {len(data.train):,} examples to train on, {len(data.test):,} to test"
    if data.train.image is not None or not len(data.train):
        return said
    cut = int((data.train.lengths >= config.max_length).sum())
    return (
        f"{said}; {int(data.train.lengths.max())} tokens at most, {cut:,} examples fill max-length = "
        f"{config.max_length} or were cut to it"
    )


def _clients(config: RunConfig, data: Prepared, clients: Sequence[int]) -> str:
    sizes = [len(data.indices(partition)) for partition in clients]
    chosen = clients_of_round(config.fraction_train, len(clients), config.min_train_nodes)
    ranks = sorted({config.rank_of(partition) for partition in clients})
    said = f"{len(clients)}, {chosen} in a round; {_range(sizes)} examples each; rank {_range(ranks)}"
    if not 0 < data.num_labels <= MOST_NAMED or data.train.targets is not None:
        return said
    held = [
        np.bincount(data.train.labels[data.indices(partition)], minlength=data.num_labels).tolist()
        for partition in clients[:MOST_NAMED]
    ]
    each = [f"client {p} {'/'.join(map(str, n))}" for p, n in zip(clients, held, strict=False)]
    more = f" and {len(clients) - MOST_NAMED} more" if len(clients) > MOST_NAMED else ""
    return f"{said}; by label: {', '.join(each)}{more}"


def preview(config: RunConfig, runtime: ClientRuntime | None = None) -> Preview:
    """The preview of a run that is not begun; nothing is written but prepared data in the cache.

    Args:
        config: of the run.
        runtime: its model and data; read where None.

    Raises:
        ConfigError: a configuration that cannot be carried out.
    """
    rule = check(config)
    runtime = runtime or read_runtime(config)
    partitions = config.partition_list or runtime.data.clients
    strategy = assemble(
        rule,
        config,
        runtime,
        partitions,
        simulation=True,
        packed=False,
        known_examples=lambda partition: len(runtime.data.indices(partition)),
    )
    assert strategy.state is not None
    return Preview(config, runtime, rule, strategy.state, partitions)
