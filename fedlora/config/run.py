"""One federated run: its own keys, the sections, and what holds for a single partition."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedlora.config.checks import from_keys, int_list, kebab, one_of, parse_json, require
from fedlora.config.privacy import PrivacyConfig
from fedlora.config.sections import (
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    StudyConfig,
    TrackingConfig,
    TrainConfig,
)
from fedlora.config.strategy import StrategyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientGroup:
    """Settings of some partitions that differ from the rest; one entry of ``client-groups``."""

    partitions: str
    """Comma list of partition ids and ranges, ``0-3,7``."""
    rank: int | None = None
    alpha: float | None = None
    target_modules: str | None = None
    local_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "local_steps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"client-groups {kebab(name)}", value, "must be > 0")

    @property
    def members(self) -> tuple[int, ...]:
        return int_list("client-groups partitions", self.partitions)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One federated run."""

    task: str = "classification"
    """``classification``, ``causal-lm`` or ``instruction``; see ``docs/tasks.md``."""
    num_server_rounds: int = 10
    """Rounds, >= 1."""
    fraction_train: float = 1.0
    """Share of the clients sampled each round, in (0, 1]."""
    min_train_nodes: int = 1
    """A round with fewer valid updates fails the run, >= 1."""
    min_available_nodes: int = 1
    """The run waits until so many clients are connected, >= 1."""
    round_timeout: float = 3600.0
    """Seconds to wait for a round's replies, > 0."""
    evaluate_every: int = 1
    """Evaluate the global model every so many rounds, >= 1 (always after the last)."""
    seed: int = 0
    """Root of all randomness, >= 0."""
    partitions: str = ""
    """Only these partitions take part, ``0-3,7``; empty means all."""
    wire_dtype: str = "float32"
    """Numbers travel as ``float32``, or as ``float16``: half the bytes, rounded where they come from."""
    output_dir: str = ""
    """Where results go; empty means ``runs/<name of the config file>``, or a folder named after the run."""
    resume: bool = False
    """Go on after the last checkpoint in ``output-dir``; ``fedlora run`` has ``--resume`` for it."""
    client_groups: str = ""
    """JSON list of groups: ``[{"partitions": "0-3", "rank": 4, "local-steps": 5}]``."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("num_server_rounds", "min_train_nodes", "min_available_nodes", "evaluate_every"):
            value = getattr(self, name)
            require(value >= 1, kebab(name), value, "must be >= 1")
        require(0 < self.fraction_train <= 1, "fraction-train", self.fraction_train, "must be in (0, 1]")
        require(self.round_timeout > 0, "round-timeout", self.round_timeout, "must be > 0")
        require(self.seed >= 0, "seed", self.seed, "must be >= 0")
        one_of("wire-dtype", self.wire_dtype, ("float32", "float16"))
        int_list("partitions", self.partitions)
        _ = self.groups

    @property
    def groups(self) -> tuple[ClientGroup, ...]:
        """The decoded client groups."""
        groups = []
        for entry in parse_json("client-groups", self.client_groups, list):
            require(isinstance(entry, dict), "client-groups", entry, "each entry must be an object")
            groups.append(from_keys(ClientGroup, entry, "client-groups "))
        for group in groups:
            _ = group.members
        return tuple(groups)

    def group_of(self, partition_id: int) -> ClientGroup | None:
        """The first group that lists this partition."""
        return next((g for g in self.groups if partition_id in g.members), None)

    def rank_of(self, partition_id: int) -> int:
        """The rank of one partition: its group's, else its entry of ``lora.ranks``."""
        group = self.group_of(partition_id)
        if group is not None and group.rank is not None:
            return group.rank
        return self.lora.rank_list[partition_id % len(self.lora.rank_list)]

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
