"""The sections of a run's configuration, one dataclass for each TOML table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlora.config.checks import float_list, int_list, kebab, name_list, one_of, parse_json, require
from fedlora.config.methods import NOT_HERE
from fedlora.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which pretrained model, and what sits on top of it."""

    name: str = "minilm"
    """``minilm``, ``smollm2``, ``tiny`` and ``tiny-lm`` (random, for tests), a directory, or a hub id."""
    pooling: str = "mean"
    """Of a classifier: ``mean`` of the token states, or ``model``: the model's own classification head."""
    head: str = "train"
    """Of a classifier: ``train`` (averaged), ``freeze``, or ``local`` (trained, never sent)."""

    quantization: str = "none"
    """``none``, or ``4bit``: the base's linear layers as NF4 by bitsandbytes (QLoRA)."""
    chat_template: str = ""
    """Of conversations: a Jinja template, or for fedlora's own commands a file with one; empty means the
    tokenizer's own."""
    chat_template_kwargs: str = ""
    """JSON object of variables for the chat template, for instance ``{"enable_thinking": false}``."""

    def __post_init__(self) -> None:
        one_of("model.quantization", self.quantization, ("none", "4bit"))
        require(bool(self.name), "model.name", self.name, "must name a model or a directory")
        one_of("model.pooling", self.pooling, ("mean", "model"))
        one_of("model.head", self.head, ("train", "freeze", "local"))
        require(
            not self.chat_template or "{" in self.chat_template,
            "model.chat-template", self.chat_template,
            "is no file that can be read here, and no Jinja template",
        )  # fmt: skip
        parse_json("model.chat-template-kwargs", self.chat_template_kwargs, dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The adapter, in PEFT's terms."""

    rank: int = 8
    """Rank r of every client, >= 1."""
    ranks: str = ""
    """Ranks by partition, ``4,8,16``, repeated over the partitions; empty means ``lora.rank``."""
    alpha: float = 16.0
    """Scaling is alpha / r (alpha / sqrt(r) with rsLoRA), > 0."""
    dropout: float = 0.0
    """Dropout on the adapter's input during training, in [0, 1)."""
    target_modules: str = ""
    """Comma list of module name endings, or ``all-linear``; empty means what PEFT chooses."""
    use_rslora: bool = False
    """Scale by 1 / sqrt(r) instead of 1 / r (rank-stabilised LoRA)."""
    method: str = "lora"
    """``lora``; others of PEFT are refused, each with its reason."""

    def __post_init__(self) -> None:
        if self.method in NOT_HERE:
            raise ConfigError(f"lora.method = {self.method!r}: {NOT_HERE[self.method]}, accepted is lora")
        one_of("lora.method", self.method, ("lora",))
        require(self.rank >= 1, "lora.rank", self.rank, "must be >= 1")
        require(all(r >= 1 for r in self.rank_list), "lora.ranks", self.ranks, "ranks must be >= 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "must be > 0")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "must be in [0, 1)")

    @property
    def rank_list(self) -> tuple[int, ...]:
        """The ranks, partition by partition, repeated."""
        return int_list("lora.ranks", self.ranks) or (self.rank,)

    def scaling(self, rank: int, alpha: float | None = None) -> float:
        """Alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)


PARTITIONERS = (
    "natural", "iid", "dirichlet", "pathological", "shard", "linear", "square", "exponential", "bootstrap",
    "natural-dirichlet",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which examples, and who holds which."""

    name: str = "sentiment"
    """``sentiment``, ``newsgroups``, ``synthetic``, ``novels``, jsonl/csv/parquet file, directory, hub id."""
    subset: str = ""
    """The configuration of a hub dataset, for instance ``sst2`` of ``glue``."""
    test: str = ""
    """A file with the test examples; empty means the dataset's test split, or ``data.test-fraction``."""
    public: str = ""
    """Examples that are nobody's secret, named as ``data.name``: what a run may start from (EVA)."""
    text_column: str = "text"
    """Column with the text; two columns for sentence pairs, ``premise,hypothesis``."""
    image_column: str = "image"
    """Column with the picture, of images."""
    label_column: str = "label"
    """Column with the label, whole numbers or names."""
    group_column: str = ""
    """Column of what must not be split between train and test (an author, a document)."""
    domain_column: str = ""
    """Column by which accuracy is also reported."""
    test_fraction: float = 0.2
    """Share held out where the data brings no test split, in (0, 1)."""
    validation_fraction: float = 0.0
    """Tuning: evaluate on this share of the training examples, taken out of them, not on the test set."""
    partitioner: str = "natural"
    """Who holds what: natural, iid, dirichlet, pathological, shard, linear, square, exponential;
    bootstrap, for which clients draw from all training examples; or natural-dirichlet: natural, and
    several clients of one value differ by Dirichlet label skew."""
    partition_by: str = "domain"
    """natural: the column whose values are the clients. dirichlet, pathological, shard use the label."""
    num_partitions: int = 0
    """Number of clients, >= 1; 0 means one for each natural value."""
    dirichlet_alpha: float = 0.5
    """Concentration of the Dirichlet label skew, > 0; small is skewed."""
    classes_per_partition: int = 2
    """Labels that each client holds under ``pathological``, >= 1."""
    min_partition_size: int = 1
    """The fewest examples a client may have, >= 1."""
    partition_size: int = 32
    """Examples that each client draws, with replacement, under ``bootstrap``, >= 1."""
    max_length: int = 64
    """Longest sequence in tokens; the rest is cut, >= 8."""
    assistant_loss: str = "all"
    """Of conversations: ``all`` answers are learned, or the ``last`` one of each."""
    evaluate_examples: int = 600
    """Test examples evaluated each round, stratified by domain; 0 means all."""

    def __post_init__(self) -> None:
        require(bool(self.name), "data.name", self.name, "must name a dataset or a file")
        require(
            not self.public or self.public != self.name,
            "data.public", self.public, "must be other examples than data.name, which the clients hold",
        )  # fmt: skip
        require(0 < self.test_fraction < 1, "data.test-fraction", self.test_fraction, "must be in (0, 1)")
        require(
            0 <= self.validation_fraction < 1,
            "data.validation-fraction", self.validation_fraction, "must be in [0, 1)",
        )  # fmt: skip
        one_of("data.partitioner", self.partitioner, PARTITIONERS)
        require(self.num_partitions >= 0, "data.num-partitions", self.num_partitions, "must be >= 0")
        require(
            self.partitioner == "natural" or self.num_partitions >= 1,
            "data.num-partitions", self.num_partitions, f"{self.partitioner} needs >= 1",
        )  # fmt: skip
        require(self.dirichlet_alpha > 0, "data.dirichlet-alpha", self.dirichlet_alpha, "must be > 0")
        require(
            self.classes_per_partition >= 1,
            "data.classes-per-partition", self.classes_per_partition, "must be >= 1",
        )  # fmt: skip
        require(
            self.min_partition_size >= 1,
            "data.min-partition-size", self.min_partition_size, "must be >= 1",
        )  # fmt: skip
        fewest = self.min_partition_size if self.partitioner == "bootstrap" else 1
        require(
            self.partition_size >= fewest,
            "data.partition-size", self.partition_size, f"must be >= {fewest}",
        )  # fmt: skip
        require(self.max_length >= 8, "data.max-length", self.max_length, "must be >= 8")
        one_of("data.assistant-loss", self.assistant_loss, ("all", "last"))
        require(
            self.evaluate_examples >= 0,
            "data.evaluate-examples", self.evaluate_examples, "must be >= 0",
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One client's work in one round. The optimiser is created anew every round."""

    optimizer: str = "adamw"
    """``adamw`` or ``sgd``."""
    learning_rate: float = 2e-3
    """Step size of the adapter, > 0."""
    head_learning_rate: float = 0.0
    """Step size of the head; 0 means ``train.learning-rate``."""
    loraplus_lr_ratio: float = 1.0
    """LoRA+: the step size of B is that of A times this, > 0."""
    momentum: float = 0.0
    """SGD momentum, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled for AdamW, L2 for SGD, >= 0."""
    local_steps: int = 10
    """Optimiser steps a round; ignored where ``train.local-epochs`` is set, >= 1."""
    local_epochs: int = 0
    """Passes over the client's data a round; 0 means ``train.local-steps`` decides."""
    batch_size: int = 8
    """Examples a step; under DP the expected number, >= 1."""
    max_grad_norm: float = 0.0
    """Clip the batch gradient to this norm (not DP); 0 means never."""
    precision: str = "float32"
    """``float32``, or ``bfloat16``: passes in half precision, on a CPU its products with the frozen base;
    factors stay float32."""
    gradient_checkpointing: bool = False
    """Keep the inputs of a transformer's blocks alone and compute the rest again: less memory, more time."""
    proximal_mu: float = 0.0
    """FedProx: adds mu/2 ||w - w_start||^2 over the trained tensors; 0 means off."""

    def __post_init__(self) -> None:
        one_of("train.optimizer", self.optimizer, ("adamw", "sgd"))
        one_of("train.precision", self.precision, ("float32", "bfloat16"))
        require(self.learning_rate > 0, "train.learning-rate", self.learning_rate, "must be > 0")
        require(self.loraplus_lr_ratio > 0, "train.loraplus-lr-ratio", self.loraplus_lr_ratio, "must be > 0")
        require(0 <= self.momentum < 1, "train.momentum", self.momentum, "must be in [0, 1)")
        require(self.local_steps >= 1, "train.local-steps", self.local_steps, "must be >= 1")
        require(self.batch_size >= 1, "train.batch-size", self.batch_size, "must be >= 1")
        for name in ("head_learning_rate", "weight_decay", "local_epochs", "max_grad_norm", "proximal_mu"):
            value = getattr(self, name)
            require(value >= 0, f"train.{kebab(name)}", value, "must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How ``fedlora run`` drives the clients; ``flwr run`` has its own settings."""

    address: str = ""
    """A Ray cluster's address, for instance ``auto``; empty starts Ray on this machine."""
    num_actors: int = 0
    """Client processes; 0 means as many as the CPUs and GPUs hold."""
    num_cpus: float = 1.0
    """CPUs that Ray reserves for each client process, > 0."""
    num_gpus: float = 0.0
    """GPUs (or a share of one) for each client process."""
    cohort_size: int = 0
    """Clients that one process trains in a single batched pass; 0 lets model and batch size decide."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``mps``."""
    max_retries: int = 3
    """How often a message is tried again after its client process died."""

    def __post_init__(self) -> None:
        one_of("engine.device", self.device, ("auto", "cpu", "cuda", "mps"))
        accepted = "must be >= 0.0001, what Ray counts in"
        require(1e-4 <= self.num_cpus < math.inf, "engine.num-cpus", self.num_cpus, accepted)
        possible = 1e-4 <= self.num_gpus <= 1 or (self.num_gpus >= 0 and float(self.num_gpus).is_integer())
        require(
            possible, "engine.num-gpus", self.num_gpus, "must be 0, a share from 0.0001 to 1, or whole GPUs"
        )
        for name in ("num_actors", "num_gpus", "cohort_size", "max_retries"):
            value = getattr(self, name)
            require(value >= 0, f"engine.{kebab(name)}", value, "must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """Who else is told about each round; it changes no result."""

    tool: str = "none"
    """``none``, ``tensorboard``, ``wandb`` (offline), ``mlflow``, ``trackio``; `fedlora.server.tracking`."""

    def __post_init__(self) -> None:
        one_of("tracking.tool", self.tool, ("none", "tensorboard", "wandb", "mlflow", "trackio"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """What ``fedlora compare`` varies; a single run ignores it."""

    title: str = ""
    """Heading of the report."""
    strategies: str = ""
    """Comma list of strategies to compare."""
    seeds: str = ""
    """Comma list of seeds; empty means the run's own ``seed``."""
    references: str = ""
    """Comma list out of ``local-only`` and ``centralised``, at the same budget."""
    settings: str = ""
    """JSON object: setting name -> keys on top of this file; everything is run under each setting."""
    overrides: str = ""
    """JSON object: strategy name (or STRATEGY-SETTING) -> keys that differ for it."""
    variants: str = ""
    """JSON object: further named runs -> keys that differ from this file."""
    comparisons: str = ""
    """Claims, tested together: METHOD:BASELINE, ``fedsvd:ffa, *:head-only``; ``*`` is all others."""
    tune_learning_rates: str = ""
    """Comma list: each strategy and variant is tuned over them, on ``data.validation-fraction``."""
    tune_seeds: str = ""
    """Comma list of the seeds on which that is done, none of ``study.seeds``."""

    def __post_init__(self) -> None:
        for name in name_list(self.references):
            one_of("study.references", name, ("local-only", "centralised"))
        int_list("study.seeds", self.seeds)
        int_list("study.tune-seeds", self.tune_seeds)
        float_list("study.tune-learning-rates", self.tune_learning_rates)
        for key in ("overrides", "variants"):
            parse_json(f"study.{key}", getattr(self, key), dict)
