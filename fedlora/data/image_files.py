"""Users' own images: a directory of pictures, a parquet file or a hub dataset with a column of images."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from fedlora.config import DataConfig
from fedlora.data.columns import NATURAL, Columns, codes_of, encode_labels, in_order, names_in, standard
from fedlora.data.images import UNREADABLE, ImageData, ImageFormat, Images, fitted
from fedlora.data.sources import open_source
from fedlora.data.split import held_out, linked_rows
from fedlora.errors import ConfigError, first_line


def own_images(config: DataConfig, form: ImageFormat, image_column: str = "image") -> ImageData:
    """Pictures of any size and mode in the form of a model; see `fitted` for how they are converted.

    ``data.name`` is a directory in the ``imagefolder`` layout of datasets (``train/LABEL/*.png``, or with a
    ``metadata.csv`` that has a column ``file_name``), a parquet file, or a hub dataset. The test images are
    its own test or validation split, else ``data.test-fraction`` is held out by domain, and never apart
    from an equal picture or one of the same ``data.group-column``. No seed changes the split. With
    ``data.validation-fraction`` see `held_apart`.

    Raises:
        ConfigError: no such data or column, a picture that cannot be decoded, labels that do not fit.
        AssetError: a hub dataset that could not be fetched.
    """
    source, own_test = open_source(config)
    columns, where = dataclasses.replace(Columns.of(config), texts=()), repr(config.name)
    sources = [source] if own_test is None else [source, own_test]
    checked = [standard(table, columns, where) for table in sources]
    tables, label_names = encode_labels(checked, source, columns, [where] * len(checked))
    domain_names = in_order(name for table in tables for name in _column(table, "domain"))
    parts = [
        Images(
            decoded(raw, image_column, form, where),
            table["label"].to_numpy(),
            codes_of(_column(table, "domain"), domain_names)
            if domain_names
            else np.full(len(raw), -1, dtype=np.int32),
        )
        for raw, table in zip(sources, tables, strict=True)
    ]
    natural = np.array(_column(tables[0], NATURAL) or _grouped(tables[0], columns, config), dtype=object)
    groups = _column(tables[0], "group")
    names = names_in(checked[0]) | ({NATURAL: tuple(in_order(natural))} if len(natural) else {})
    if own_test is not None:
        data = ImageData(parts[0], parts[1], label_names, tuple(domain_names), tuple(natural), names)
        return held_apart(data, config, groups)
    test = _held_out(parts[0], groups, config.test_fraction, "data.test-fraction")
    train = parts[0].take(~test)
    clients = tuple(natural[~test]) if len(natural) else ()
    data = ImageData(train, parts[0].take(test), label_names, tuple(domain_names), clients, names)
    return held_apart(data, config, [group for group, out in zip(groups, test, strict=False) if not out])


def held_apart(data: ImageData, config: DataConfig, groups: Sequence[str] = ()) -> ImageData:
    """With ``data.validation-fraction`` that share of the training images in the place of the test images.

    Args:
        data: any images.
        config: how large the share is; with 0 the data is returned as it is.
        groups: of each training image, what must not be split.

    Raises:
        ConfigError: the training images cannot be split.
    """
    if not config.validation_fraction:
        return data
    out = _held_out(data.train, groups, config.validation_fraction, "data.validation-fraction")
    natural = tuple(name for name, gone in zip(data.natural, out, strict=False) if not gone)
    return dataclasses.replace(data, train=data.train.take(~out), test=data.train.take(out), natural=natural)


def decoded(table: Dataset, column: str, form: ImageFormat, where: str) -> np.ndarray:
    """The pictures of a column, uint8 (rows, channels, size, size).

    Raises:
        ConfigError: no such column, or a picture that is missing or cannot be decoded; it is named.
    """
    pixels = np.empty((len(table), form.channels, form.size, form.size), dtype=np.uint8)
    for row, stored in enumerate(_stored(table, column, where)):
        try:
            with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as picture:
                pixels[row] = fitted(picture, form)
        except UNREADABLE as error:
            name = stored["path"] or f"number {row}"
            raise ConfigError(
                f"data: picture {name} of {where} cannot be used ({first_line(error)})"
            ) from None
    return pixels


def has_pictures(table: Dataset, column: str) -> bool:
    """Whether there is such a column of images."""
    return isinstance(table.features.get(column), ImageFeature)


def _stored(table: Dataset, column: str, where: str) -> Iterator[Mapping[str, Any]]:
    """Bytes or path of each picture, not decoded."""
    if not has_pictures(table, column):
        raise ConfigError(
            f"data.image-column = {column!r}: no such column of images in {where}, it has "
            f"{', '.join(table.column_names)}"
        )
    raw = table.select_columns([column]).cast_column(column, ImageFeature(decode=False))
    for row, stored in enumerate(raw):
        if stored[column] is None:
            raise ConfigError(f"data: picture number {row} of {where} is missing")
        yield stored[column]


def _column(table: pa.Table, name: str) -> list[str]:
    values: list[str] = table[name].to_pylist() if name in table.column_names else []
    return values


def _grouped(table: pa.Table, columns: Columns, config: DataConfig) -> list[str]:
    """The groups, where they are the clients."""
    by_group = config.partitioner == "natural" and columns.group and config.partition_by == columns.group
    return _column(table, "group") if by_group else []


def _held_out(images: Images, groups: Sequence[str], fraction: float, key: str) -> np.ndarray:
    """Held-out images as booleans; equal pictures and groups are never apart."""
    keys = [[image.tobytes() for image in images.pixels], *([groups] if groups else [])]
    test = held_out(linked_rows(*keys), images.domains.tolist(), fraction)
    if test.all() or not test.any():
        raise ConfigError(f"{key} = {fraction}: {len(images)} images cannot be split by group and duplicates")
    return test
