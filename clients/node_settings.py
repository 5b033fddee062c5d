"""Settings of a node, which its owner makes in its ``node.toml``; Flower calls them the node config."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from fedlora.assets.fetch import cache_dir
from fedlora.config.checks import name_list, require
from fedlora.config.section import by_field, section
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.prepared.node_data import OwnData

NODE_FILE = "node.toml"
STATE = "state"
"""Folder of a node's directory that its start script names."""
FLOWERS_OWN = ("num-partitions", "simulation")
"""Keys of a node config that an engine sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationNoise:
    """What the owner of a node sets for evaluations.

    Attributes:
        epsilon: of each.
        count_hidden: the number of examples is hidden behind a declared one.
    """

    epsilon: float
    count_hidden: bool


@section()
class NodeSettings:
    """A ``node.toml``."""

    partition_id: NonNegativeInt
    """Which partition this node is, for instance ``0``; the server checks it against the node's key."""
    data: str = ""
    """The node's own examples, an absolute path, for instance ``/srv/notes.jsonl``; empty: this partition of
    the run's dataset."""
    text_column: str = "text"
    """Column of ``data`` with the text."""
    image_column: str = "image"
    """Column of ``data`` with the picture."""
    label_column: str = "label"
    """Column of ``data`` with the label; empty: no labels."""
    unit_column: str = ""
    """Column of ``data`` that says whose an example is, see ``docs/privacy.md``; ``:row``: each row's own."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of ``data`` kept from training, to measure a personal model on."""
    dataset_id: str = ""
    """The owner's name for the data, by which spent privacy is written down, for instance ``notes-2025``."""
    max_epsilon: NonNegativeFloat = 0.0
    """The owner's own limit, over all runs; 0 means none."""
    max_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Delta of that limit."""
    declared_examples: NonNegativeInt = 0
    """A public number that stands for that of the examples, not below it; 0: the real one is public."""
    release_metrics: bool = False
    """Give private runs that ask the training loss and the number of examples, outside the claim."""
    max_evaluations: NonNegativeInt = 0
    """Evaluations that may leave a protected node; outside the claim but for ``evaluation-epsilon``."""
    evaluation_epsilon: NonNegativeFloat = 0.0
    """Epsilon of each of them, which then leave with noise, within ``max-epsilon``; 0: they leave exactly."""
    secure_clients: NonNegativeInt = 0
    """Send what was trained only within secure sums of at least so many clients, for instance ``5``; 0: as
    the run says, see ``docs/secure.md``."""
    secure_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The least ``secure.threshold`` of a run with secure sums, for instance ``0.66``; 0: as the run says."""
    secure_peers: str = ""
    """File with the public keys of the federation's nodes, for instance ``peers.toml``, beside this node's
    ``key``; then clients of secure sums are nodes that are in it. Empty: whoever the server says."""
    keep_model: bool = False
    """Keep the base model, and what each message has to import, in memory between messages."""
    allow: str = ""
    """Comma list of what a run's configuration may name on this machine, for instance ``/srv/models/bert,
    mine:Adam``: files, directories and ``module:Class``, letter for letter; empty: none."""
    state_dir: str = ""
    """What the node keeps, for instance ``/srv/fedlora``; ``FEDLORA_STATE_DIR`` says where if it is empty."""

    def __post_init__(self) -> None:
        require(not self.data or Path(self.data).is_absolute(), "data", self.data, "must be an absolute path")
        require(
            not self.data or bool(self.dataset_id), "dataset-id", self.dataset_id,
            "must name your data, privacy spent on it is written down under that name",
        )  # fmt: skip
        require(
            not self.evaluation_epsilon or bool(self.data), "evaluation-epsilon", self.evaluation_epsilon,
            "takes test examples of the node's own, data names none",
        )  # fmt: skip
        require(
            not self.evaluation_epsilon or self.max_epsilon > 0,
            "evaluation-epsilon", self.evaluation_epsilon,
            "takes max-epsilon, without which runs that are not private are evaluated exactly",
        )  # fmt: skip
        require(
            not self.evaluation_epsilon or self.max_evaluations > 0, "evaluation-epsilon",
            self.evaluation_epsilon, "takes max-evaluations, how many there may be, which is 0",
        )  # fmt: skip
        require(
            not self.max_epsilon or self.set_aside <= self.max_epsilon, "evaluation-epsilon",
            self.evaluation_epsilon,
            f"max-evaluations = {self.max_evaluations} of them take {self.set_aside:g}, max-epsilon is "
            f"{self.max_epsilon:g}",
        )  # fmt: skip
        require(
            not (self.evaluation_epsilon and self.unit_column), "evaluation-epsilon", self.evaluation_epsilon,
            "must be 0 with unit-column, an evaluation's noise hides one test example and no person",
        )  # fmt: skip
        require(
            bool(self.data) or not self.unit_column, "unit-column", self.unit_column,
            "names a column of data, which is empty",
        )  # fmt: skip
        require(self.dataset_id.isprintable(), "dataset-id", self.dataset_id, "must be one line of text")

    @property
    def allowed(self) -> tuple[str, ...]:
        """The entries of ``allow``."""
        return name_list(self.allow)

    @property
    def set_aside(self) -> float:
        """Epsilon that is kept for evaluations, whether or not they are asked for."""
        return self.max_evaluations * self.evaluation_epsilon

    @property
    def home(self) -> Path:
        """Directory that the node keeps between messages."""
        path = self.state_dir or os.environ.get("FEDLORA_STATE_DIR")
        return Path(path) if path else cache_dir() / "clients"


def node_settings(node_config: Mapping[str, Any]) -> NodeSettings:
    """The settings in a Flower node config; read once for each distinct one.

    Raises:
        ConfigError: an unknown key, or a value that is not accepted.
    """
    own = {key: value for key, value in node_config.items() if key not in FLOWERS_OWN}
    for key, value in own.items():
        require(isinstance(value, (bool, int, float, str)), key, value, "must be a boolean, number or text")
    return _settings(tuple(sorted(own.items())))


@lru_cache(maxsize=64)
def _settings(items: tuple[tuple[str, Any], ...]) -> NodeSettings:
    return NodeSettings(**by_field(dict(items)))


def own_of(settings: NodeSettings, labels: tuple[str, ...] = ()) -> OwnData | None:
    """The node's own examples with the run's label names; None where it trains on the run's dataset."""
    if not settings.data:
        return None
    from fedlora.prepared.node_data import OwnData

    return OwnData(
        path=settings.data,
        text_column=settings.text_column,
        image_column=settings.image_column,
        label_column=settings.label_column,
        unit_column=settings.unit_column,
        test_fraction=settings.test_fraction,
        dataset_id=settings.dataset_id,
        partition_id=settings.partition_id,
        labels=labels,
        home=settings.home / "data",
    )


def state_of(directory: Path, settings: NodeSettings) -> Path:
    """What a node's directory keeps between messages, where its start script has it."""
    return Path(settings.state_dir) if settings.state_dir else directory / STATE


def read_node(directory: Path) -> NodeSettings:
    """The settings in a node's directory.

    Raises:
        ConfigError: there is no ``node.toml``, or it is not accepted.
    """
    file = directory / NODE_FILE
    try:
        table = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: not a TOML file ({error})") from None
    try:
        return node_settings(table)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
