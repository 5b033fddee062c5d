"""Examples that a program holds in memory, as the data of a run.

A run's processes and its record need a name that stays: the examples are kept as parquet in the cache, under
a digest of themselves, and what is returned is that path. It is read, checked and refused like any file.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.assets.fetch import cache_dir
from fedlora.errors import ConfigError, first_line, unknown_name

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("train", "test", "validation")


def from_dataframe(frame: Any) -> str:
    """A pandas ``DataFrame`` as a value of ``data.name``, ``data.test`` or ``data.public``.

    For instance ``fedlora.run(data={"name": fedlora.data.from_dataframe(frame), "text_column": "review"})``.
    The index is left out.

    Raises:
        ConfigError: no DataFrame, one without a row, or a column whose values are of several types.
    """
    import pyarrow as pa
    from datasets import Dataset

    if not hasattr(frame, "columns") or not hasattr(frame, "iloc"):
        raise ConfigError(f"from_dataframe: {type(frame).__name__} is no pandas DataFrame")
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        plain = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in table.columns]
        return _kept("from_dataframe", {"train": Dataset(pa.table(plain, names=table.column_names))})
    except OverflowError:
        raise ConfigError(f"from_dataframe: {_overflowing(frame)}") from None
    except (pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise _refused("from_dataframe", error) from None


def from_datasets(dataset: Dataset | DatasetDict) -> str:
    """A ``datasets.Dataset``, or a ``DatasetDict`` with its own test split, as a value of ``data.name``.

    Names of classes, and pictures, are kept with it.

    Raises:
        ConfigError: neither, a split that no run reads, or one without a row.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(dataset, DatasetDict):
        for name in dataset:
            if name not in SPLITS:
                raise unknown_name("from_datasets: split", name, SPLITS)
        if "train" not in dataset:
            raise ConfigError(
                f"from_datasets: there is no train split, it has {', '.join(dataset) or 'none'}"
            )
        return _kept("from_datasets", dataset)
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"from_datasets: {type(dataset).__name__} is neither a datasets.Dataset nor a DatasetDict"
        )
    return _kept("from_datasets", {"train": dataset})


def _kept(where: str, splits: Mapping[str, Dataset]) -> str:
    """The path of a parquet file, or of a directory with one for each of several splits."""
    for name, split in splits.items():
        if not len(split):
            raise ConfigError(f"{where}: there is no row in {name if len(splits) > 1 else 'it'}")
    place = cache_dir() / "frames"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=place, prefix=".new-") as folder, _silently():
        digest = hashlib.sha256()
        for name, split in sorted(splits.items()):
            split.to_parquet(str(Path(folder) / f"{name}.parquet"))
            digest.update(name.encode() + b"\0" + (Path(folder) / f"{name}.parquet").read_bytes())
        kept = place / digest.hexdigest()[:32]
        kept.mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            file.replace(kept / file.name)
    return str(kept if len(splits) > 1 else kept / "train.parquet")


@contextmanager
def _silently() -> Iterator[None]:
    """Without the progress bars of datasets, which are for longer work."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _overflowing(frame: Any) -> str:
    """The first column with a whole number that no table holds, and its row."""
    limit = range(-(2**63), 2**64)
    found = (
        f"column {name!r} holds {str(value)[:20]}.. in row {row}"
        for name, column in frame.items()
        for row, value in enumerate(column, start=1)
        if isinstance(value, int) and value not in limit
    )
    return f"{next(found, 'a whole number')}, must have 64 bits (or be text)"


def _refused(where: str, error: BaseException) -> ConfigError:
    if isinstance(error, ConfigError):
        return error
    said = str(error) if isinstance(error, UnicodeError) else ", ".join(map(str, error.args))
    return ConfigError(f"{where}: {first_line(said)}")
