"""Protocol of a task; nothing else of it is known elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from fedlora.config import DataConfig
from fedlora.data.chat.template import ChatSettings
from fedlora.data.columns import Columns
from fedlora.data.examples import REJECTED, Examples
from fedlora.data.images import ImageFormat

if TYPE_CHECKING:
    from datasets import Dataset

    from fedlora.data.sources import RawData

Rows: TypeAlias = Mapping[str, Any]
"""Some rows of a table, column by column, under the names of `Columns`."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples made of the rows of a table; there may be more or fewer of them than rows.

    Attributes:
        values: what the model sees of each example, token ids int32 or pixels uint8.
        rows: the row from which each example has its label, domain, group and client.
        counted: for each value whether the loss counts it, uint8; None where the task needs no such thing.
        types: of each token which text of a pair it is of, uint8; None where all are 0.
        image: the form of the images; None where the examples are texts.
        splits: of pairs, how many tokens the first of the two has; None where examples are single.
    """

    values: list[np.ndarray]
    rows: np.ndarray
    counted: list[np.ndarray] | None = None
    types: list[np.ndarray] | None = None
    image: ImageFormat | None = None
    splits: list[int] | None = None


@dataclass(frozen=True, slots=True)
class ExampleMetrics:
    """Predictions of a model for a batch, example by example.

    Attributes:
        losses: of each example, float32; the mean over its units.
        units: what is judged in each example: 1, or its counted tokens. int64.
        right: how many of them the model's first choice hits, int64.
        outputs: what the model gives for an example's K targets, (rows, K), float32; None without targets.
    """

    losses: np.ndarray
    units: np.ndarray
    right: np.ndarray
    outputs: np.ndarray | None = None


class Task(Protocol):
    """One task.

    The loss is one number *for each example* and knows no other example of the batch: DP-SGD clips the
    gradient of each, and a cohort trains examples of several clients in one pass.

    Attributes:
        name: as in the configuration.
        network: what is built, a key of ``fedlora.models.build.NETWORKS``.
        labelled: whether examples have a label, and the model a head of its own for it.
        unit: what is judged, in the singular.
        most_tokens: padded tokens of an evaluation pass at most; 0 where only the number of examples counts.
        packs: whether several examples can be one row.
        keeps_rows: whether each row is one example, however long it is and whatever the model.
        problem_type: transformers' word for what the head's outputs mean; empty where there is no head.
        metrics: names in `fedlora.tasks.metrics` by which runs are judged, the first one by default.
    """

    name: str
    network: str
    labelled: bool
    unit: str
    most_tokens: int
    packs: bool
    keeps_rows: bool
    problem_type: str
    metrics: tuple[str, ...]

    def columns(self, config: DataConfig) -> Columns:
        """Columns of the dataset that are read.

        Raises:
            ConfigError: too many of them, or a partitioner that needs what the examples do not have.
        """

    def reader(self, model: str, chat: ChatSettings | None = None) -> Any:
        """Preprocessor of a model: its tokenizer, or the format of its images.

        ``chat`` says how conversations are written, None as the tokenizer does by itself. What is returned
        has an ``identity``, which changes with what it makes, and a ``pad_token_id``.

        Raises:
            ConfigError: the model has none.
        """

    def load(self, config: DataConfig, reader: Any, unit: str = "") -> RawData:
        """The rows to train and to test on; ``unit`` as in `Columns`.

        Raises:
            ConfigError: they cannot be read.
            AssetError: they could not be fetched.
        """

    def rows(
        self, source: Dataset, columns: Columns, config: DataConfig, reader: Any, where: str
    ) -> pa.Table:
        """The rows of one table under the names of `Columns`, labels as they are; what `encode` reads.

        Args:
            source: the table.
            columns: of it, from `columns`.
            config: names further columns.
            reader: from `reader`; None where no model is known and the rows are only looked at.
            where: the table, in an error.

        Raises:
            ConfigError: a missing column, an empty value, a row that cannot be read.
        """

    def encode(self, batches: Iterable[Rows], reader: Any, max_length: int) -> Encoded:
        """The examples.

        Args:
            batches: all rows, some at a time, in order.
            reader: from `reader`.
            max_length: of an example, in tokens.

        Raises:
            ConfigError: a row that is no example, or none that is one.
        """

    def cut_by(self, config: DataConfig) -> tuple[str, ...]:
        """Attributes of a `fedlora.privacy.cut.Cut` that decide what one example is; none if it is a row."""

    def loss(self, module: nn.Module, batch: Mapping[str, Tensor], reduction: str) -> Tensor:
        """The loss of each example, (rows,), or their ``mean`` or ``sum``.

        Args:
            module: the model.
            batch: from `fedlora.data.examples.collate`.
            reduction: ``none``, ``mean`` or ``sum``, over examples.
        """

    def evaluate_batch(self, module: nn.Module, batch: Mapping[str, Tensor]) -> ExampleMetrics:
        """Loss, units and hits of each example."""

    def synthetic_examples(self, number: int, config: Any, pad_token_id: int) -> Examples:
        """A few examples of nobody, of unequal length where examples can have that, always the same.

        Args:
            number: of them.
            config: the model's.
            pad_token_id: never occurs in them.
        """


NO_INPUTS = frozenset({"labels", "counted", "segments", "reference"})
"""What a batch has for the loss alone."""


def inputs(module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a model in a batch: token types where it takes them."""
    left_out = {name for name in batch if name in NO_INPUTS or name.startswith(REJECTED)}
    if "token_type_ids" in batch and not takes_types(module):
        left_out.add("token_type_ids")
    return {name: tensor for name, tensor in batch.items() if name not in left_out}


def takes_types(module: Any) -> bool:
    """Whether a model tells token types apart: its forward names them, its config has more than one.

    A RoBERTa, whose config has one, would be given a number that its embedding lacks.
    """
    if hasattr(module, "get_base_model"):  # a PeftModel
        module = module.get_base_model()
    network = getattr(module, "backbone", module)  # a mean-pooled classifier hands on what its own takes
    return (
        "token_type_ids" in inspect.signature(network.forward).parameters
        and getattr(network.config, "type_vocab_size", 2) > 1
    )
