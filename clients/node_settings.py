"""What the owner of a node decides, in its ``node.toml``, which Flower calls the node config.

| key | meaning |
|---|---|
| ``partition-id`` | which partition this node is; the server checks it against the node's key |
| ``data`` | the node's own examples, an absolute path; empty: this partition of the run's dataset |
| ``text-column``, ``image-column``, ``label-column`` | in ``data``; an empty ``label-column``: no labels |
| ``test-fraction`` | share of ``data`` kept from training, to measure a personal model on |
| ``dataset-id`` | the owner's name for the data, under which spent privacy is written down |
| ``max-epsilon``, ``max-delta`` | the owner's own limit, over all runs; ``max-epsilon`` 0 means none |
| ``keep-model`` | keep the base model in memory between messages |
| ``state-dir`` | what the node keeps; ``FEDLORA_STATE_DIR`` says where if it is absent |
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.assets.fetch import cache_dir
from fedlora.config.checks import from_keys, require
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.prepared.node_data import OwnData

FLOWERS_OWN = ("num-partitions", "simulation")
"""Keys of a node config that an engine sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """The keys of the table above."""

    partition_id: int
    data: str = ""
    text_column: str = "text"
    image_column: str = "image"
    label_column: str = "label"
    test_fraction: float = 0.0
    dataset_id: str = ""
    max_epsilon: float = 0.0
    max_delta: float = 1e-5
    keep_model: bool = False
    state_dir: str = ""

    def __post_init__(self) -> None:
        require(self.partition_id >= 0, "partition-id", self.partition_id, "must be >= 0")
        require(not self.data or Path(self.data).is_absolute(), "data", self.data, "must be an absolute path")
        require(
            not self.data or bool(self.dataset_id), "dataset-id", self.dataset_id,
            "must name your data, privacy spent on it is written down under that name",
        )  # fmt: skip
        require(self.dataset_id.isprintable(), "dataset-id", self.dataset_id, "must be one line of text")
        require(0 <= self.test_fraction < 1, "test-fraction", self.test_fraction, "must be in [0, 1)")
        require(self.max_epsilon >= 0, "max-epsilon", self.max_epsilon, "must be >= 0")
        require(0 < self.max_delta < 1, "max-delta", self.max_delta, "must be in (0, 1)")

    @property
    def home(self) -> Path:
        """Where the node keeps things between messages."""
        path = self.state_dir or os.environ.get("FEDLORA_STATE_DIR")
        return Path(path) if path else cache_dir() / "clients"


def node_settings(node_config: Mapping[str, Any]) -> NodeSettings:
    """The settings in a Flower node config.

    Raises:
        ConfigError: an unknown key, or a value that is not accepted.
    """
    own = {key: value for key, value in node_config.items() if key not in FLOWERS_OWN}
    settings: NodeSettings = from_keys(NodeSettings, own, "")
    return settings


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
        test_fraction=settings.test_fraction,
        dataset_id=settings.dataset_id,
        partition_id=settings.partition_id,
        labels=labels,
        home=settings.home / "data",
    )


def read_node(directory: Path) -> NodeSettings:
    """The settings in a node's directory.

    Raises:
        ConfigError: there is no ``node.toml``, or it is not accepted.
    """
    file = directory / "node.toml"
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
