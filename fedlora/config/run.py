"""One federated run: its own keys, the sections, and what holds for a single partition."""

from __future__ import annotations

from dataclasses import field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fedlora.config.checks import int_list, parse_json, require
from fedlora.config.devices import DevicesConfig
from fedlora.config.privacy import PrivacyConfig
from fedlora.config.section import by_field, section
from fedlora.config.sections import (
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    StudyConfig,
    TrackingConfig,
)
from fedlora.config.secure import SecureConfig
from fedlora.config.strategy import StrategyConfig
from fedlora.config.train import TrainConfig


@section("client-groups ")
class ClientGroup:
    """Settings of some partitions that differ from the rest; one entry of ``client-groups``."""

    partitions: str
    """Comma list of partition ids and ranges, for instance ``0-3,7``."""
    rank: PositiveInt | None = None
    """In place of ``lora.rank`` and ``lora.ranks``, for instance ``4``."""
    alpha: PositiveFloat | None = None
    """In place of ``lora.alpha``, for instance ``8.0``."""
    target_modules: str | None = None
    """In place of ``lora.target-modules``, for instance ``query,value``."""
    local_steps: PositiveInt | None = None
    """In place of ``train.local-steps``, for instance ``5``."""
    batch_size: PositiveInt | None = None
    """In place of ``train.batch-size``, for instance ``4``."""
    learning_rate: PositiveFloat | None = None
    """In place of ``train.learning-rate``, for instance ``0.001``."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """In place of ``train.schedule``, for instance ``cosine``."""
    warmup_steps: NonNegativeInt | None = None
    """In place of ``train.warmup-steps``, for instance ``2``."""
    device: str | None = None
    """One of ``devices.profiles``, instead of one that is drawn, for instance ``phone``."""

    def __post_init__(self) -> None:
        _ = self.members

    @property
    def own_train(self) -> dict[str, Any]:
        """What differs from ``train``, by field."""
        own = {
            name: getattr(self, name) for name in ("batch_size", "learning_rate", "schedule", "warmup_steps")
        }
        return {name: value for name, value in own.items() if value is not None}

    @cached_property
    def members(self) -> tuple[int, ...]:
        return int_list("client-groups partitions", self.partitions)


@section()
class RunConfig:
    """One federated run."""

    task: str = "classification"
    """``classification``, ``regression``, ``multi-label-classification``, ``causal-lm``, ``instruction``,
    ``dpo`` or ``image-classification``; see ``docs/tasks.md``."""
    num_server_rounds: PositiveInt = 10
    """Rounds."""
    fraction_train: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the clients sampled each round."""
    min_train_nodes: PositiveInt = 1
    """A round with fewer valid updates fails the run."""
    min_available_nodes: PositiveInt = 1
    """The run waits until so many clients are connected."""
    round_timeout: PositiveFloat = 3600.0
    """Seconds to wait for a round's replies."""
    max_missed_rounds: NonNegativeInt = 2
    """In a deployment, a node that let so many rounds in a row pass without a reply is set aside for ten
    rounds, then tried again; 0: it is waited for in every round."""
    evaluate_every: PositiveInt = 1
    """Evaluate the global model every so many rounds (always after the last)."""
    evaluation_precision: Literal["float32", "bfloat16"] = "float32"
    """Every evaluation of the run, the last one too, is computed in ``float32``, or in ``bfloat16``, as in
    ``train.precision``."""
    generate_every: NonNegativeInt = 0
    """Of language models: ``samples.json`` also has what the global model writes every so many rounds; 0
    means before training and at the end alone."""
    early_stopping_patience: NonNegativeInt = 0
    """The run ends after so many evaluations in a row without a better one; 0 means never."""
    early_stopping_threshold: NonNegativeFloat = 0.0
    """How much better an evaluation must be for patience to begin anew."""
    load_best_model_at_end: bool = False
    """The model of the best evaluation is measured and written at the end, not the last one."""
    metric_for_best_model: str = "loss"
    """What is better: a lower ``loss`` or ``rmse``, or a higher ``accuracy``, ``r2``, ``f1_micro`` or
    ``f1_macro``, whichever the task has; ``reviews_loss`` is that of the evaluation set ``reviews``."""
    save_total_limit: PositiveInt = 1
    """Checkpoints that are kept, those of the last rounds; a run can go on from any of them, see
    ``docs/training.md``."""
    seed: NonNegativeInt = 0
    """Root of all randomness."""
    partitions: str = ""
    """Only these partitions take part, for instance ``0-3,7``; empty means all."""
    wire_dtype: Literal["float32", "float16"] = "float32"
    """Numbers travel as ``float32``, or as ``float16``: half the bytes, rounded where they come from."""
    upload: str = ""
    """What clients send travels as ``float32``, ``float16``, or, for instance ``int8``, the change in 8 bits
    by stochastic rounding, a quarter of the bytes; others are ``int4``, ``topk``, ``segments``, ``changed``
    and ``seeds``, see ``docs/strategy.md``; empty means as ``wire-dtype``."""
    max_rank: NonNegativeInt = 0
    """Cut the adapter that is written to this rank, by SVD, as ``fedlora run --max-rank``; 0 leaves it as it
    is."""
    license: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]*$"), "name one as the hub does"] = ""
    """Licence of the adapter that is written, for its model card, as the hub names it, for instance
    ``apache-2.0``; empty names none."""
    output_dir: str = ""
    """Where results go, for instance ``runs/a``; empty means ``runs/<name of the config file>``, or a
    folder named after the run."""
    resume: bool = False
    """Go on after the last checkpoint in ``output-dir``; ``fedlora run`` has ``--resume`` for it."""
    client_groups: str = ""
    """JSON list of groups, for instance ``[{"partitions": "0-3", "rank": 4, "local-steps": 5}]``."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    secure: SecureConfig = field(default_factory=SecureConfig)
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _ = self.partition_list
        for group in (None, *self.groups):
            self._check_warmup(group)
        most, share = self.devices.over_selection, self.fraction_train
        require(
            most * share <= 1 or most == 1, "devices.over-selection", most,
            f"times fraction-train = {share:g} must be <= 1, or there are not so many to ask",
        )  # fmt: skip
        self._check_evaluations()
        require(
            self.task != "dpo" or self.evaluation_precision == "float32",
            "evaluation-precision", self.evaluation_precision,
            "must be 'float32' with task = 'dpo', whose margins are small differences of large sums",
        )  # fmt: skip
        require(
            self.secure.noise == "none" or self.privacy.client_level, "secure.noise", self.secure.noise,
            f"is noise for whole clients, privacy.mode is {self.privacy.mode!r}, must be 'client'",
        )  # fmt: skip
        kinds = self.devices.kinds
        for group in self.groups:
            require(
                group.device is None or group.device in kinds, "client-groups device", group.device,
                f"devices.profiles has {', '.join(kinds) or 'none'}",
            )  # fmt: skip

    @cached_property
    def partition_list(self) -> tuple[int, ...]:
        """The decoded ``partitions``."""
        return int_list("partitions", self.partitions)

    @cached_property
    def groups(self) -> tuple[ClientGroup, ...]:
        """The decoded client groups."""
        entries = parse_json("client-groups", self.client_groups, list)
        for entry in entries:
            require(isinstance(entry, dict), "client-groups", entry, "each entry must be an object")
        return tuple(ClientGroup(**by_field(entry)) for entry in entries)

    @cached_property
    def _group_by_partition(self) -> dict[int, ClientGroup]:
        return {partition: group for group in reversed(self.groups) for partition in group.members}

    def group_of(self, partition_id: int) -> ClientGroup | None:
        """The first group that lists this partition."""
        return self._group_by_partition.get(partition_id)

    def rank_of(self, partition_id: int) -> int:
        """The rank of one partition: its group's, else its entry of ``lora.ranks``."""
        group = self.group_of(partition_id)
        if group is not None and group.rank is not None:
            return group.rank
        return self.lora.rank_list[partition_id % len(self.lora.rank_list)]

    @property
    def mixed(self) -> bool:
        """Whether some clients are asked for something else than others."""
        return bool(self.groups) or len(set(self.lora.rank_list)) > 1

    def alpha_of(self, partition_id: int) -> float:
        """The alpha of one partition: its group's, else ``lora.alpha``."""
        group = self.group_of(partition_id)
        return self.lora.alpha if group is None or group.alpha is None else group.alpha

    def local_steps_of(self, partition_id: int) -> int:
        """The local steps of one partition: its group's, else ``train.local-steps``."""
        group = self.group_of(partition_id)
        if group is None or group.local_steps is None:
            return self.train.local_steps
        return group.local_steps

    def train_of(self, partition_id: int) -> TrainConfig:
        """The ``train`` of one partition, with what its group has of its own (`local_steps_of` apart)."""
        return self._train_by_group[self.group_of(partition_id)]

    @property
    def measured_once(self) -> dict[str, int | bool]:
        """Keys by which the same rounds are measured after the last one only."""
        return {
            "evaluate-every": self.num_server_rounds,
            "early-stopping-patience": 0,
            "load-best-model-at-end": False,
        }

    @property
    def schedules_rounds(self) -> bool:
        """Whether step sizes follow from how many rounds there are."""
        falls = any(train.schedule != "constant" for train in self._train_by_group.values())
        return falls and self.train.schedule_over != "round"

    @cached_property
    def _train_by_group(self) -> dict[ClientGroup | None, TrainConfig]:
        return {None: self.train} | {group: replace(self.train, **group.own_train) for group in self.groups}

    def _check_evaluations(self) -> None:
        """Refuse to choose or to stop where there are too few evaluations for it."""
        number = -(-self.num_server_rounds // self.evaluate_every)
        among = f"evaluate-every = {self.evaluate_every} makes {number} in {self.num_server_rounds} rounds"
        require(
            number > 1 or not self.load_best_model_at_end, "load-best-model-at-end", True,
            f"must be false without evaluations to choose among, {among}",
        )  # fmt: skip
        patience = self.early_stopping_patience
        require(
            patience < number or patience == 0, "early-stopping-patience", patience,
            f"must be below the number of evaluations, {among}",
        )  # fmt: skip

    def _check_warmup(self, group: ClientGroup | None) -> None:
        """Refuse a warm-up that never ends; under ``train.local-epochs`` steps follow from the data."""
        train, steps, rounds = self._train_by_group[group], self.train.local_steps, self.num_server_rounds
        if group is not None and group.local_steps is not None:
            steps = group.local_steps
        most = {"round": steps, "rounds": rounds, "run": steps * rounds}[train.schedule_over]
        unknown = train.local_epochs > 0 and train.schedule_over != "rounds"
        require(
            unknown or train.warmup_steps < most or train.warmup_steps == 0,
            "train.warmup-steps" if group is None else "client-groups warmup-steps", train.warmup_steps,
            f"must be < {most}, which is all there is under train.schedule-over = {train.schedule_over!r}",
        )  # fmt: skip
