"""Sources of examples: the built-in datasets, a file, a directory, or the Hugging Face hub."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    DownloadManager,
    disable_progress_bars,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from fedlora.assets.fetch import cache_dir
from fedlora.config import DataConfig, name_list
from fedlora.data.builtin.newsgroups import newsgroups_tables
from fedlora.data.builtin.novels import novels_table
from fedlora.data.builtin.sentiment import sentiment_table
from fedlora.data.builtin.synthetic import synthetic_table
from fedlora.data.columns import BUILT_IN, LONG_TEXTS, PICTURES, Columns, encode_labels, names_in, standard
from fedlora.data.directories import data_files, describes_itself, load_files, parquet_files
from fedlora.data.named_files import FILE_KINDS, PARQUET, names_file, no_such_file
from fedlora.data.split import split_table, split_texts
from fedlora.data.targets import encode_targets
from fedlora.data.text_files import DELIMITERS, JSON, kind_of, read_text_files
from fedlora.data.values import columns_named, python_values
from fedlora.errors import AssetError, ConfigError, first_line

HIDDEN = (None, "", "-1", -1)
"""What stands for a label that is kept back."""
GUESSED = ("csv", "json")
"""Kinds of files for which datasets guesses types, piece by piece of a file."""
KINDS_OF_FILES = frozenset(_PACKAGED_DATASETS_MODULES)
"""What datasets takes for all files of that kind in the directory where one stands; one of them unpickles."""


@dataclass(frozen=True, slots=True)
class RawData:
    """Examples as text, before tokenising.

    Attributes:
        train: columns text (and text_pair), label (int64) or targets where there are any, domain and group
            where there are any, natural: the column of ``data.partition-by`` where that is another, and unit.
        test: the same columns.
        label_names: name of each label; empty where examples have none.
        names: label, domain, group and natural -> the names in the training rows before any were held out.
        sets: further test examples by name, the same columns.
    """

    train: Dataset
    test: Dataset
    label_names: tuple[str, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sets: Mapping[str, Dataset] = field(default_factory=dict)


def load_examples(config: DataConfig, columns: Columns | None = None) -> RawData:
    """Train and test examples. The split never depends on a seed, so every run has the same test set.

    The columns are those of the configuration unless given. Test examples come from ``data.test``, else from
    the dataset's own labelled test or validation split, else ``data.test-fraction`` is held out: by domain,
    and never apart from another row with the same group or the same words. With ``data.validation-fraction``
    the test examples are left out, and a share of the training examples, split off in the same way, stands in
    their place. Of a novel the last part is held out.

    Raises:
        ConfigError: a missing file or column, an empty value, labels that do not fit.
        AssetError: a dataset that could not be fetched.
    """
    columns = Columns.of(config) if columns is None else columns
    source, own_test = open_source(config, labelled=bool(columns.label))
    where = [repr(config.name)]
    parts = [standard(source, columns, where[0])]
    test = read_file(Path(config.test), "data.test") if config.test else own_test
    if test is not None:
        columns = replace(columns, unit="")  # only what is trained on is private
        where.append(repr(config.test) if config.test else f"the test examples of {config.name!r}")
        parts.append(standard(test, columns, where[-1]))
    columns, sets = replace(columns, unit=""), config.evaluation_files
    for file in sets.values():
        where.append(repr(file))
        parts.append(standard(read_file(Path(file), "data.evaluation-sets"), columns, where[-1]))
    names: tuple[str, ...] = ()
    tables = parts
    if columns.targets:
        tables, names = encode_targets(parts, columns.label, None, where)
    elif columns.label:
        tables, names = encode_labels(parts, source, columns, where)
    split = split_texts if config.name in LONG_TEXTS else split_table
    own, more = tables[: len(tables) - len(sets)], tables[len(tables) - len(sets) :]
    train, test_table = own if len(own) == 2 else split(tables[0], config.test_fraction, "data.test-fraction")
    if config.validation_fraction:
        train, test_table = split(train, config.validation_fraction, "data.validation-fraction")
    further = {name: Dataset(table) for name, table in zip(sets, more, strict=True)}
    return RawData(Dataset(train), Dataset(test_table), names, names_in(parts[0]), further)


def open_source(config: DataConfig, *, labelled: bool = True) -> tuple[Dataset, Dataset | None]:
    """All or the train examples, and the dataset's own test examples (with labels) if it has any.

    Raises:
        ConfigError: it cannot be read.
        AssetError: it could not be fetched.
    """
    path = Path(config.name).expanduser()
    if config.name in PICTURES:
        raise ConfigError(f"data.name = {config.name!r}: holds pictures, use task = 'image-classification'")
    if config.subset and (config.name in BUILT_IN or path.exists()):
        raise ConfigError(f"data.subset = {config.subset!r}: only a hub dataset has subsets")
    match config.name:
        case "sentiment":
            return sentiment_table(), None
        case "newsgroups":
            return newsgroups_tables()
        case "synthetic":
            return synthetic_table(), None
        case "novels":
            return novels_table(), None
    if path.is_dir():
        label = config.label_column if labelled else ""
        return _own_splits(_read_directory(path, label), config, labelled)
    if path.is_file() or names_file(config.name):
        return read_file(path, "data.name"), None
    return _own_splits(_from_hub(config), config, labelled)


def open_table(path: Path, text_column: str, key: str) -> list[Any]:
    """The texts of a file: a string for each row, or a pair where two columns are named.

    Raises:
        ConfigError: a file that cannot be read, has no such column, or an empty value.
    """
    columns = Columns(name_list(text_column), "", "", "", natural="", written=text_column)
    table = standard(read_file(path, key), columns, repr(str(path)))
    texts = [table[name].to_pylist() for name in ("text", "text_pair") if name in table.column_names]
    return texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))


def read_file(path: Path, key: str) -> Dataset:
    """The rows of a csv, tsv, JSON or parquet file that a key names.

    Raises:
        ConfigError: no such file, or one that cannot be read.
    """
    path = path.expanduser()
    if not path.is_file():
        raise no_such_file(path, key)
    if kind_of(path) not in FILE_KINDS and not _is_zip(path):
        raise ConfigError(
            f"{key} = {str(path)!r}: files must end in {', '.join(FILE_KINDS)}, all but the last may be .gz"
        )
    if _is_zip(path):
        raise ConfigError(f"{key} = {str(path)!r}: is a zip archive or an Excel file, save it as csv (UTF-8)")
    return _loaded(f"{key} = {str(path)!r}", lambda: _files({"train": [path]})["train"])


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _files(splits: Mapping[str, Sequence[Path]]) -> Any:
    """Files of one kind as the splits of a dataset."""
    kinds = {kind_of(file) for files in splits.values() for file in files}
    if kinds == {PARQUET}:
        return parquet_files(splits)
    if not kinds <= {*DELIMITERS, *JSON}:
        return load_files(splits)
    return DatasetDict(
        {
            split: Dataset(read_text_files([(kind_of(file), file) for file in files]))
            for split, files in splits.items()
        }
    )


def _read_directory(path: Path, label: str) -> Any:
    def load() -> Any:
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return load_from_disk(str(path))
        splits = {} if describes_itself(path) else data_files(path, label)
        return (
            _files(splits)
            if splits
            else _loose_files(str(path.absolute()), cache=str(cache_dir() / "datasets"))
        )

    return _loaded(f"data.name = {str(path)!r}", load)


def _loose_files(name: str, subset: str | None = None, cache: str | None = None) -> Any:
    """A hub dataset, or files of one kind in a directory.

    Text files whose columns have no declared types are read as others are. datasets gives pictures no label
    where all are in one directory.
    """
    builder = load_dataset_builder(name, subset, cache_dir=cache)
    named = [str(file) for part in (builder.config.data_files or {}).values() for file in part]
    if not Path(name).is_absolute() and not all("://" in file for file in named):
        raise ValueError("its description on the hub names files of this machine")
    options: dict[str, Any] = {}
    if builder.name in GUESSED and not _declares(builder):
        found = {split: _text_files(files) for split, files in builder.config.data_files.items()}
        if all(found.values()):
            return DatasetDict(
                {str(split): Dataset(read_text_files(files)) for split, files in found.items()}
            )
    if isinstance(builder, ImageFolder):
        files = [Path(file) for part in builder.config.data_files.values() for file in part]
        depths = {len(file.parts) for file in files if file.suffix.lower() in builder.EXTENSIONS}
        options = {"drop_labels": False} if len(depths) == 1 else {}
    return load_dataset(name, subset, cache_dir=cache, **options)


def _declares(builder: Any) -> bool:
    """Whether a dataset says how its text files are to be read: types of columns, a delimiter or other."""
    plain, about = type(builder.config)(), ("name", "version", "data_dir", "data_files", "description")
    said = {
        key.name
        for key in fields(plain)
        if key.name not in about and getattr(builder.config, key.name) != getattr(plain, key.name)
    }
    files = [file for part in builder.config.data_files.values() for file in part]
    if {DELIMITERS.get(kind_of(file)) for file in files} == {getattr(builder.config, "sep", None)}:
        said.discard("sep")
    return bool(said) or builder.info.features is not None


def _text_files(files: Sequence[str]) -> list[tuple[str, Path]]:
    """Kind and place of each file, fetched where it is not here; none if one is of a kind of its own."""
    kinds = [kind_of(file) for file in files]
    if not all(kind in (*DELIMITERS, *JSON) for kind in kinds):
        return []
    places = DownloadManager().download(list(files))
    return [(kind, Path(place)) for kind, place in zip(kinds, places, strict=True)]


def _from_hub(config: DataConfig) -> Any:
    subset = f" with data.subset = {config.subset!r}" if config.subset else ""
    where = f"data.name = {config.name!r}{subset}"
    if config.name in KINDS_OF_FILES:
        raise ConfigError(f"{where}: is a kind of files and no dataset, name the file or the directory")
    try:
        return _loaded(where, lambda: _loose_files(config.name, config.subset or None))
    except ConnectionError as error:
        raise AssetError(
            f"{where}: not built in ({', '.join(BUILT_IN)}), no file or directory, and the hub cannot be "
            f"reached ({first_line(error)})"
        ) from None


def _loaded(where: str, load: Callable[[], Any]) -> Any:
    """Result of ``load``, its failures told in one line; progress bars only on a terminal."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return load()
    except ConnectionError:
        raise
    except (DatasetsError, OSError, ValueError, pa.ArrowException) as error:
        raise ConfigError(f"{where}: cannot be read ({first_line(error.__cause__ or error)})") from None


def _own_splits(loaded: Any, config: DataConfig, labelled: bool) -> tuple[Dataset, Dataset | None]:
    """The train split and the first one of test and validation, with labels where there are such."""
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    if "train" not in splits:
        raise ConfigError(f"data.name = {config.name!r}: has no train split, it has {', '.join(splits)}")
    for name in ("test", "validation"):
        if name in splits and (not labelled or _labelled(splits[name], config.label_column)):
            return splits["train"], splits[name]
    return splits["train"], None


def _labelled(table: Dataset, column: str) -> bool:
    """Whether the labels are there."""
    columns = list(columns_named(column, table.column_names))
    if not {*columns} <= {*table.column_names}:
        return False
    labels = table.with_format("arrow").select_columns(columns)[:]
    return all(any(v not in HIDDEN for v in python_values(labels[name])) for name in columns)
