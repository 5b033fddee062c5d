"""The sections of a run's configuration, one for each TOML table."""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fedlora.config.checks import float_list, int_list, name_list, one_of, parse_json, require
from fedlora.config.section import by_field, section

FromZeroBelowOne = Annotated[float, Field(ge=0, lt=1)]


@section("model.")
class ModelConfig:
    """Which pretrained model, and what sits on top of it."""

    name: Annotated[str, Field(min_length=1), "name a model or a directory"] = "minilm"
    """``minilm``, ``smollm2``, ``tiny`` and ``tiny-lm`` (random, for tests), a directory, or a hub id."""
    pooling: Literal["mean", "model"] = "mean"
    """Of a classifier: ``mean`` of the token states, or ``model``: the model's own classification head."""
    head: Literal["train", "freeze", "local"] = "train"
    """Of a classifier: ``train`` (averaged), ``freeze``, or ``local`` (trained, never sent)."""
    adapter: str = ""
    """Directory of a PEFT adapter that the run starts from, for instance ``runs/a/adapter``; see
    ``docs/training.md``."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Numbers of the frozen base: ``float32``, ``bfloat16``, ``float16``, or ``auto``, those of its files;
    factors and head are float32 always. See ``docs/tasks.md``."""
    quantization: Literal["none", "4bit"] = "none"
    """``none``, or ``4bit``: the base's linear layers as NF4 by bitsandbytes (QLoRA)."""
    chat_template: str = ""
    """Of conversations: a Jinja template, for instance ``{{ messages[0].content }}``, or for fedlora's own
    commands a file with one; empty means the tokenizer's own."""
    chat_template_kwargs: str = ""
    """JSON object of variables for the chat template, for instance ``{"enable_thinking": false}``."""

    def __post_init__(self) -> None:
        require(
            not self.chat_template or "{" in self.chat_template,
            "model.chat-template", self.chat_template,
            "is no file that can be read here, and no Jinja template",
        )  # fmt: skip
        _ = self.template_variables

    @cached_property
    def template_variables(self) -> dict[str, Any]:
        """The decoded ``chat-template-kwargs``."""
        variables: dict[str, Any] = parse_json("model.chat-template-kwargs", self.chat_template_kwargs, dict)
        return variables


@section("lora.")
class LoraConfig:
    """The adapter, in PEFT's terms."""

    rank: PositiveInt = 8
    """Rank r of every client."""
    ranks: str = ""
    """Ranks by partition, in turn, for instance ``4,8,16``; empty means ``lora.rank``."""
    alpha: PositiveFloat = 16.0
    """Scaling is alpha / r (alpha / sqrt(r) with rsLoRA)."""
    dropout: FromZeroBelowOne = 0.0
    """Dropout on the adapter's input during training."""
    target_modules: str = ""
    """Comma list of module name endings, for instance ``query,value``, or ``all-linear``; empty means what
    PEFT chooses."""
    personal_rank: NonNegativeInt = 0
    """Rank of a second adapter that each client trains beside the global one and keeps; 0 means none. See
    ``docs/personal.md``."""
    personal_weights: Literal["one", "input"] = "one"
    """Of both adapters in a client's model: ``one``, or by each ``input``'s likeness to its own (FedDPA)."""
    use_rslora: bool = False
    """Scale by 1 / sqrt(r) instead of 1 / r (rank-stabilised LoRA)."""
    method: str = "lora"
    """``lora``, or another of PEFT's tuners, which takes of rank, alpha and dropout what it has of them:
    ``vera``, ``randlora``, ``fourierft``, ``waveft``, ``c3a``, ``shira``, ``sara``, ``ia3``, ``loha``,
    ``lokr``, ``hira``, ``gralora``, ``miss``, ``psoft``, or ``module:TUNER`` of your own; see
    ``docs/peft.md``."""
    method_options: str = ""
    """JSON object of further fields of that tuner's configuration in PEFT, for instance
    ``{"n_frequency": 500}``."""

    def __post_init__(self) -> None:
        _ = self.method_option_dict
        require(all(r >= 1 for r in self.rank_list), "lora.ranks", self.ranks, "ranks must be >= 1")

    @cached_property
    def method_option_dict(self) -> dict[str, Any]:
        """The decoded ``method_options``, by PEFT's names."""
        return by_field(parse_json("lora.method-options", self.method_options, dict))

    @cached_property
    def rank_list(self) -> tuple[int, ...]:
        """The ranks, partition by partition, repeated."""
        return int_list("lora.ranks", self.ranks) or (self.rank,)

    def scaling(self, rank: int, alpha: float | None = None) -> float:
        """Alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return (self.alpha if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)


Partitioner = Literal[
    "natural", "iid", "dirichlet", "pathological", "shard", "linear", "square", "exponential", "bootstrap",
    "natural-dirichlet",
]  # fmt: skip


@section("data.")
class DataConfig:
    """Which examples, and who holds which."""

    name: Annotated[str, Field(min_length=1), "name a dataset or a file"] = "sentiment"
    """``sentiment``, ``newsgroups``, ``synthetic``, ``novels``, jsonl/csv/parquet file, directory, hub id."""
    subset: str = ""
    """The configuration of a hub dataset, for instance ``sst2`` of ``glue``."""
    test: str = ""
    """A file with the test examples, for instance ``test.jsonl``; empty means the dataset's test split, or
    ``data.test-fraction``."""
    evaluation_sets: str = ""
    """JSON object of names and files with further test examples, for instance
    ``{"reviews": "reviews.jsonl"}``: every evaluation is of each of them too, see ``docs/training.md``."""
    public: str = ""
    """Examples that are nobody's secret, named as ``data.name``, for instance ``public.jsonl``: what a run
    may start from (EVA)."""
    text_column: str = "text"
    """Column with the text; two columns for sentence pairs, ``premise,hypothesis``."""
    image_column: str = "image"
    """Column with the picture, of images."""
    label_column: str = "label"
    """Column with the label, whole numbers or names; of a task of targets its columns, for instance
    ``"stars, size"``, see ``docs/tasks.md``."""
    group_column: str = ""
    """Column of what must not be split between train and test, for instance ``author``."""
    domain_column: str = ""
    """Column by which accuracy is also reported, for instance ``source``."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share held out where the data brings no test split."""
    validation_fraction: FromZeroBelowOne = 0.0
    """Tuning: evaluate on this share of the training examples, taken out of them, not on the test set."""
    partitioner: Partitioner = "natural"
    """Who holds what: natural, iid, dirichlet, pathological, shard, linear, square, exponential;
    bootstrap, for which clients draw from all training examples; or natural-dirichlet: natural, and
    several clients of one value differ by Dirichlet label skew."""
    partition_by: str = "domain"
    """natural: the column whose values are the clients. dirichlet, pathological, shard use the label."""
    num_partitions: NonNegativeInt = 0
    """Number of clients; 0 means one for each natural value."""
    dirichlet_alpha: PositiveFloat = 0.5
    """Concentration of the Dirichlet label skew; small is skewed."""
    classes_per_partition: PositiveInt = 2
    """Labels that each client holds under ``pathological``."""
    min_partition_size: PositiveInt = 1
    """The fewest examples a client may have."""
    partition_size: PositiveInt = 32
    """Examples that each client draws, with replacement, under ``bootstrap``."""
    max_length: Annotated[int, Field(ge=8)] = 64
    """Longest sequence in tokens; the rest is cut."""
    assistant_loss: Literal["all", "last"] = "all"
    """Of conversations: ``all`` answers are learned, or the ``last`` one of each."""
    evaluate_examples: NonNegativeInt = 600
    """Test examples evaluated each round, stratified by domain; 0 means all."""

    @cached_property
    def evaluation_files(self) -> dict[str, str]:
        """Name -> file of ``evaluation-sets``."""
        files: dict[str, str] = parse_json("data.evaluation-sets", self.evaluation_sets, dict)
        for name, file in files.items():
            require(
                isinstance(file, str) and bool(file and re.fullmatch(r"[\w.-]+", name)),
                "data.evaluation-sets", {name: file}, "must be a name (letters, digits, -, ., _) and a file",
            )  # fmt: skip
        return files

    def __post_init__(self) -> None:
        _ = self.evaluation_files
        require(
            not self.public or self.public != self.name,
            "data.public", self.public, "must be other examples than data.name, which the clients hold",
        )  # fmt: skip
        require(
            self.partitioner == "natural" or self.num_partitions >= 1,
            "data.num-partitions", self.num_partitions, f"{self.partitioner} needs >= 1",
        )  # fmt: skip
        require(
            self.partitioner != "bootstrap" or self.partition_size >= self.min_partition_size,
            "data.partition-size", self.partition_size, f"must be >= {self.min_partition_size}",
        )  # fmt: skip


@section("engine.")
class EngineConfig:
    """How ``fedlora run`` drives the clients; ``flwr run`` has its own settings."""

    name: Literal["ray", "in-process"] = "ray"
    """``ray``, or ``in-process``: one client after the other, for small runs and debuggers."""
    address: str = ""
    """A Ray cluster's address, for instance ``auto``; empty starts Ray on this machine."""
    num_actors: NonNegativeInt = 0
    """Client processes; 0 means as many as the CPUs and GPUs hold."""
    num_cpus: Annotated[float, Field(ge=1e-4), "what Ray counts in"] = 1.0
    """CPUs that Ray reserves for each client process."""
    num_gpus: Annotated[float, Field(ge=0), "a share from 0.0001 to 1, or whole GPUs"] = 0.0
    """GPUs (or a share of one) for each client process."""
    cohort_size: NonNegativeInt = 0
    """Clients that one process trains in a single batched pass; 0 lets model and batch size decide."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``mps``."""
    max_retries: NonNegativeInt = 3
    """How often a message is tried again after its client process died."""

    def __post_init__(self) -> None:
        possible = self.num_gpus == 0 or 1e-4 <= self.num_gpus <= 1 or self.num_gpus.is_integer()
        accepted = "must be 0, a share from 0.0001 to 1, or whole GPUs"
        require(possible, "engine.num-gpus", self.num_gpus, accepted)


@section("tracking.")
class TrackingConfig:
    """Who else is told about each round; it changes no result."""

    tool: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """``none``, ``tensorboard``, ``wandb`` (offline), ``mlflow``, ``trackio``; `fedlora.server.tracking`."""


@section("study.")
class StudyConfig:
    """What ``fedlora compare`` varies; a single run ignores it."""

    title: str = ""
    """Heading of the report, for instance ``Ranks``."""
    strategies: str = ""
    """Comma list of strategies to compare, for instance ``fedavg,own:Rule,mixed=flora``; the last is
    ``flora`` under a name of its own, for ``overrides``."""
    seeds: str = ""
    """Comma list of seeds, for instance ``1,2,3``; empty means the run's own ``seed``."""
    references: str = ""
    """Comma list out of two, at the same budget, for instance ``local-only,centralised``."""
    settings: str = ""
    """JSON object: setting name -> keys on top of this file, for instance ``{"skewed":
    {"data.dirichlet-alpha": 0.1}}``; everything is run under each setting."""
    overrides: str = ""
    """JSON object: strategy name (or STRATEGY-SETTING) -> keys that differ for it, for instance ``{"flora":
    {"lora.alpha": 8}}``."""
    variants: str = ""
    """JSON object: further named runs -> keys that differ from this file, for instance ``{"sgd":
    {"train.optimizer": "sgd"}}``."""
    comparisons: str = ""
    """Claims, tested together: METHOD:BASELINE, for instance ``fedsvd:ffa, *:head-only``; ``*`` is all
    others."""
    metric: str = ""
    """By what runs are judged, for instance ``mae``: ``accuracy``; of regressions ``rmse``, ``mae``, ``r2``;
    of many labels ``f1_micro``, ``f1_macro``, ``accuracy``; empty is the first one of the task."""
    target_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The report says what each run sends, and in simulated time how long it takes, until a round's accuracy
    is this, for instance ``0.78``; 0 asks for nothing."""
    tune_learning_rates: str = ""
    """Comma list, for instance ``0.001,0.003``: each strategy and variant is tuned over them, on
    ``data.validation-fraction``."""
    tune_seeds: str = ""
    """Comma list of the seeds on which that is done, none of ``study.seeds``, for instance ``101,102``."""
    tune_epsilon: NonNegativeFloat = 0.0
    """What the choice may tell of validation examples: noise on the hits of each trial; 0: it is by exact
    accuracies, which is outside epsilon."""

    def __post_init__(self) -> None:
        for name in name_list(self.references):
            one_of("study.references", name, ("local-only", "centralised"))
        require(
            not self.tune_epsilon or bool(self.tune_learning_rates), "study.tune-epsilon", self.tune_epsilon,
            "takes study.tune-learning-rates, what is chosen from",
        )  # fmt: skip
        _ = self.seed_list, self.tune_seed_list, self.learning_rate_list, self.objects

    @cached_property
    def seed_list(self) -> tuple[int, ...]:
        """The decoded ``seeds``."""
        return int_list("study.seeds", self.seeds)

    @cached_property
    def tune_seed_list(self) -> tuple[int, ...]:
        """The decoded ``tune-seeds``."""
        return int_list("study.tune-seeds", self.tune_seeds)

    @cached_property
    def learning_rate_list(self) -> tuple[float, ...]:
        """The decoded ``tune-learning-rates``."""
        return float_list("study.tune-learning-rates", self.tune_learning_rates)

    @cached_property
    def objects(self) -> dict[str, dict[str, Any]]:
        """The decoded ``settings``, ``overrides`` and ``variants``, by those names."""
        names = ("settings", "overrides", "variants")
        return {name: parse_json(f"study.{name}", getattr(self, name), dict) for name in names}
