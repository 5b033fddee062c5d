"""Image classification: one label for a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedlora.config import DataConfig
from fedlora.core.seeding import stream
from fedlora.data.columns import NATURAL, PICTURE, Columns, standard
from fedlora.data.examples import Examples
from fedlora.data.images import ImageData, ImageFormat, Images
from fedlora.errors import ConfigError
from fedlora.tasks.classification import Classification
from fedlora.tasks.task import Encoded, Rows

if TYPE_CHECKING:
    from datasets import Dataset

    from fedlora.data.sources import RawData


@dataclass(frozen=True, slots=True)
class ImageReader:
    """The form in which a model takes images, in the place of a tokenizer."""

    form: ImageFormat
    pad_token_id: int = 0

    @property
    def identity(self) -> str:
        return json.dumps(asdict(self.form), sort_keys=True)


class ImageClassification(Classification):
    """``data.image-column`` and ``data.label-column``; built-in images bring their domains."""

    name = "image-classification"
    network = "image-classifier"

    def columns(self, config: DataConfig) -> Columns:
        """The label; the pictures are decoded on their way."""
        return replace(Columns.of(config), texts=())

    def reader(self, model: str, chat: Any = None) -> Any:
        """The form of the model's images."""
        from fedlora.data.image_reader import image_format

        return ImageReader(image_format(model))

    def load(self, config: DataConfig, reader: Any, unit: str = "") -> RawData:
        """Pictures in the model's form, as bytes.

        Raises:
            ConfigError: a unit; pictures of a run's dataset have none yet.
        """
        if unit:
            raise ConfigError(
                f"privacy.unit-column = {unit!r}: task = {self.name!r} knows no units, each picture is one; "
                "must be empty"
            )
        from fedlora.data.sources import RawData

        data = self.images(config, reader.form)
        train, test = _table(data.train, data, data.natural), _table(data.test, data, ())
        return RawData(train, test, data.label_names, data.names)

    def images(self, config: DataConfig, form: ImageFormat) -> ImageData:
        """All pictures of a run, training and test.

        Raises:
            ConfigError: no such data or column, a picture that cannot be decoded, labels that do not fit.
        """
        from fedlora.data.builtin.image_sets import SOURCES, built_in_images
        from fedlora.data.image_files import held_apart, own_images

        if config.name in SOURCES:
            return held_apart(built_in_images(config.name, form), config)
        return own_images(config, form, config.image_column)

    def rows(
        self, source: Dataset, columns: Columns, config: DataConfig, reader: Any, where: str
    ) -> pa.Table:
        """The label, and the pictures in the model's form, as bytes; without a reader in that of NATIVE."""
        from fedlora.data.builtin.image_sets import NATIVE
        from fedlora.data.image_files import decoded

        table = standard(source, columns, where)
        form = NATIVE if reader is None else reader.form
        return table.append_column(PICTURE, _as_bytes(decoded(source, config.image_column, form, where)))

    def encode(self, batches: Iterable[Rows], reader: Any, max_length: int) -> Encoded:
        """The pixels of each picture, channel by channel and row by row."""
        values = [np.frombuffer(pixels, dtype=np.uint8) for batch in batches for pixels in batch[PICTURE]]
        return Encoded(values, np.arange(len(values)), image=reader.form)

    def synthetic_examples(self, number: int, config: Any, pad_token_id: int) -> Examples:
        """Noise, the labels in turn."""
        form = ImageFormat(
            size=config.image_size, channels=config.num_channels,
            mean=(0.5,) * config.num_channels, std=(0.5,) * config.num_channels,
        )  # fmt: skip
        pixels = form.channels * form.size**2
        return Examples(
            tokens=stream(0, "self-test", "images").integers(0, 256, number * pixels).astype(np.uint8),
            offsets=np.arange(number + 1) * pixels,
            labels=np.arange(number) % config.num_labels,
            domains=np.zeros(number, dtype=np.int32),
            image=form,
        )


def _as_bytes(pixels: np.ndarray) -> pa.Array:
    return pa.array([image.tobytes() for image in pixels], pa.large_binary())


def _table(images: Images, data: ImageData, natural: tuple[str, ...]) -> Dataset:
    from datasets import Dataset

    columns: dict[str, Any] = {
        PICTURE: _as_bytes(images.pixels),
        "label": images.labels,
    }
    if data.domain_names:
        columns["domain"] = pa.array([data.domain_names[d] for d in images.domains], pa.large_string())
    if natural:
        columns[NATURAL] = pa.array(natural, pa.large_string())
    return Dataset(pa.table(columns))
