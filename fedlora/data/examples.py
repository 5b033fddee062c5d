"""Encoded examples behind a memory map, batches of them, and the fixed subset for evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fedlora.core.seeding import stream
from fedlora.data.images import ImageFormat, Images, image_batch
from fedlora.data.targets import TARGETS
from fedlora.errors import ConfigError

REJECTED = "rejected_"
"""Prefix of what is of the second side of a pair, in a batch."""
EVALUATION_BATCH = 64
"""Examples of an evaluation pass at most."""
IMAGE = b"image"
"""In an Arrow file's metadata: the form of its images as JSON."""


@dataclass(frozen=True, slots=True)
class Examples:
    """Texts or images; the arrays are read-only views of a memory-mapped file.

    Attributes:
        tokens: all token ids one after another, int32; of images all pixels, uint8.
        offsets: example i is ``tokens[offsets[i]:offsets[i + 1]]``, int64, shape (examples + 1,).
        labels: int64, shape (examples,).
        targets: what is to be predicted in place of a label, float32, shape (examples, K); None where that is
            a label.
        domains: index into the domain names, -1 where there are none, int32, shape (examples,).
        counted: for each token whether the loss counts it, uint8; None where that goes without saying.
        types: the type of each token (which text of a pair it is of), uint8; None where all are 0.
        image: the form of the images; None where the examples are texts.
        splits: of pairs, where in ``tokens`` the second of the two begins, int64, shape (examples,); None
            where examples are single.
        reference: what a reference makes of each side of a pair, float32, shape (examples, 2); None where
            that is not known.
        units: a number for whose each example is (``privacy.unit-column``), int32, shape (examples,); None
            where each example is a unit of privacy by itself.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    domains: np.ndarray
    counted: np.ndarray | None = None
    types: np.ndarray | None = None
    image: ImageFormat | None = None
    units: np.ndarray | None = None
    splits: np.ndarray | None = None
    reference: np.ndarray | None = None
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def input_ids(self, index: int) -> np.ndarray:
        """Token ids of one example, of a pair those of the first, int32, not padded."""
        end = self.offsets[index + 1] if self.splits is None else self.splits[index]
        return self.tokens[self.offsets[index] : end]

    def none(self) -> Examples:
        """No examples, of the same kind."""
        return replace(
            self, tokens=self.tokens[:0], offsets=self.offsets[:1], labels=self.labels[:0],
            domains=self.domains[:0], counted=None if self.counted is None else self.counted[:0],
            types=None if self.types is None else self.types[:0],
            units=None if self.units is None else self.units[:0],
            splits=None if self.splits is None else self.splits[:0],
            reference=None if self.reference is None else self.reference[:0],
            targets=None if self.targets is None else self.targets[:0],
        )  # fmt: skip

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64, shape (examples,)."""
        return np.diff(self.offsets)

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of some examples, int64, shape (indices,); what a pass over them costs."""
        if self.image is not None:
            return np.full(len(indices), self.image.tokens)
        found: np.ndarray = self.offsets[indices + 1] - self.offsets[indices]
        return found


def open_examples(path: Path) -> Examples:
    """The examples of an Arrow IPC file; nothing is read before it is used."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    rows, ids = batch.num_rows, batch.column("input_ids")
    offsets = _view(ids, np.int64, rows + 1)
    form = (batch.schema.metadata or {}).get(IMAGE)
    return Examples(
        tokens=_view(ids.values, np.int32 if form is None else np.uint8, len(ids.values)),
        offsets=offsets,
        labels=_view(batch.column("label"), np.int64, rows),
        domains=_view(batch.column("domain"), np.int32, rows),
        counted=_by_token(batch, "counted"),
        types=_by_token(batch, "types"),
        image=None if form is None else ImageFormat(**json.loads(form)),
        units=_view(batch.column("unit"), np.int32, rows) if "unit" in batch.schema.names else None,
        splits=offsets[:-1] + _view(batch.column("split"), np.int64, rows)
        if "split" in batch.schema.names
        else None,
        targets=_matrix(batch, TARGETS),
    )


def with_form(batch: pa.RecordBatch, form: ImageFormat | None) -> pa.RecordBatch:
    """The batch with the form of its images, for `open_examples`; itself where they are texts."""
    return batch if form is None else batch.replace_schema_metadata({IMAGE: json.dumps(asdict(form))})


def _matrix(batch: pa.RecordBatch, column: str) -> np.ndarray | None:
    """A column of lists of one length, float32, shape (rows, K)."""
    if column not in batch.schema.names:
        return None
    lists = batch.column(column)
    return _view(lists.values, np.float32, len(lists.values)).reshape(-1, lists.type.list_size)


def _by_token(batch: pa.RecordBatch, column: str) -> np.ndarray | None:
    if column not in batch.schema.names:
        return None
    numbers = batch.column(column).values
    return _view(numbers, np.uint8, len(numbers))


def cut(
    examples: Examples, indices: np.ndarray, batch_size: int = EVALUATION_BATCH, most_tokens: int = 0
) -> list[np.ndarray]:
    """The batches, as places in ``indices``: by length, so that they depend on the examples alone.

    Args:
        examples: the data set.
        indices: which of them.
        batch_size: examples of a batch at most.
        most_tokens: padded tokens of a batch at most (0: any number); one longer example is a batch.

    Raises:
        ConfigError: there is no example.
    """
    if len(indices) == 0:
        raise ConfigError("there is no example to evaluate on")
    lengths = examples.lengths_of(indices)
    by_length = np.argsort(lengths, kind="stable")
    batches: list[np.ndarray] = []
    start = 0
    while start < len(by_length):
        size = batch_size
        if most_tokens:
            next_lengths = lengths[by_length[start : start + batch_size]]
            padded = next_lengths * np.arange(1, len(next_lengths) + 1)
            size = max(1, int(np.searchsorted(padded, most_tokens, side="right")))
        batches.append(by_length[start : start + size])
        start += size
    return batches


def _view(array: pa.Array, kind: type, count: int) -> np.ndarray:
    """The numbers in an array's second buffer (values, or a list's offsets); to_numpy imports pandas."""
    return np.frombuffer(array.buffers()[1], dtype=kind, count=count)


def collate(examples: Examples, indices: Sequence[int] | np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
    """One batch: input_ids and attention_mask of shape (batch, longest), labels of shape (batch,), int64.

    Where examples have targets these are their labels, of shape (batch, K), float32.
    Of images pixel_values of shape (batch, channels, height, width), float32, and labels.
    And, where the examples say it, of shape (batch, longest) and 0 in the padding: ``counted``, whether the
    loss counts a token, and ``token_type_ids``.
    The longest is the longest of this batch; no indices give shape (0, 1).
    Of pairs these are of the first side, those of the second have the prefix `REJECTED`, and ``reference`` is
    of shape (batch, 2), float32.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if examples.image is not None:
        return _images(examples, chosen, examples.image)
    starts, ends = examples.offsets[chosen], examples.offsets[chosen + 1]
    wanted = examples.labels if examples.targets is None else examples.targets
    labels = {"labels": torch.from_numpy(wanted[chosen])}
    if examples.splits is None:
        return _padded(examples, starts, ends, pad_token_id) | labels
    splits, known = examples.splits[chosen], examples.reference
    second = _padded(examples, splits, ends, pad_token_id)
    return {
        **_padded(examples, starts, splits, pad_token_id),
        **{REJECTED + name: tensor for name, tensor in second.items()},
        **({} if known is None else {"reference": torch.from_numpy(known[chosen])}),
        **labels,
    }


def _padded(examples: Examples, starts: np.ndarray, ends: np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
    """Stretches of the tokens as rows of one length, and what is said of each token."""
    shape = (len(starts), int((ends - starts).max(initial=1)))
    named = (("counted", examples.counted), ("token_type_ids", examples.types))
    found = {"input_ids": np.full(shape, pad_token_id, dtype=np.int64)}
    found["attention_mask"] = np.zeros(shape, dtype=np.int64)
    found |= {name: np.zeros(shape, dtype=np.int64) for name, numbers in named if numbers is not None}
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        length = end - start
        found["input_ids"][row, :length] = examples.tokens[start:end]
        found["attention_mask"][row, :length] = 1
        for name, numbers in named:
            if numbers is not None:
                found[name][row, :length] = numbers[start:end]
    return {name: torch.from_numpy(array) for name, array in found.items()}


def _images(examples: Examples, indices: np.ndarray, form: ImageFormat) -> dict[str, Tensor]:
    pixels = examples.tokens.reshape(len(examples), form.channels, form.size, form.size)
    return image_batch(Images(pixels, examples.labels, examples.domains), indices, form)


def evaluation_subset(examples: Examples, size: int) -> np.ndarray:
    """Indices of a fixed subset with the domains in proportion, sorted int64; size 0 means all.

    The same examples and size give the same subset in every run.
    """
    if size == 0 or size >= len(examples):
        return np.arange(len(examples))
    order = stream(0, "evaluation-subset").permutation(len(examples))
    domains = examples.domains[order]
    # Rank of each example inside its domain, as a share of the domain: the smallest shares are taken.
    share = np.empty(len(order))
    for domain in np.unique(domains):
        members = np.flatnonzero(domains == domain)
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(share, kind="stable")[:size]])
