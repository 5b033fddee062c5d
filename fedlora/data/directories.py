"""Data files of a directory: which are read, as what kind, and in which split of the dataset.

Names are names and never patterns. A directory of which one kind of files would hide another, or in which
rows stand twice, is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset
from datasets.data_files import FILES_TO_IGNORE, DataFilesList, _get_data_files_patterns
from datasets.packaged_modules import _EXTENSION_TO_MODULE
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from fsspec.utils import glob_translate  # type: ignore[import-untyped]
from huggingface_hub import DatasetCard

from fedlora.assets.fetch import cache_dir
from fedlora.data.named_files import PARQUET
from fedlora.data.text_files import DELIMITERS, JSON, column_names
from fedlora.data.values import columns_named

IMAGES = "images"
"""Kind of all files that are pictures."""
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
"""Endings of compressed copies."""
GLUE_ASIDE = frozenset({"dev_ids.tsv", "dev_mismatched.tsv", "test_mismatched.tsv"})
"""What GLUE ships beside train.tsv and is not read; nor is its directory ``original``."""
GLUE_TESTS = ("test.tsv", "test_matched.tsv")
"""Test examples of GLUE, of which the labels are kept back."""
_ADVICE = "name the file that is meant, or move the others away"
_MOST_NAMED = 3
"""Files that a refusal names of each kind."""


def data_files(path: Path, label: str) -> dict[str, list[Path]]:
    """Split -> its files, of one kind of tables or pictures; empty where there are none of these.

    By their names as datasets has it: ``train``, ``validation`` or ``dev``, ``test``; else all are ``train``.

    Args:
        path: the directory.
        label: the label column, or several; a ``test.tsv`` (GLUE) with neither these nor all columns of
            ``train.tsv`` is none.

    Raises:
        ValueError: two kinds of files, or a file and its compressed copy.
    """
    found = list(_candidates(path))
    pictures = any(_kind(Path(name)) == IMAGES for name in found)

    def tables(names: Iterable[str]) -> list[str]:
        about = ImageFolder.METADATA_FILENAMES if pictures else ()
        return [name for name in names if _kind(Path(name)) and Path(name).name not in about]

    splits = _splits(found)
    named = [name for names in splits.values() for name in names]
    if tables(found) and not tables(named):
        raise ValueError(f"holds {_few(tables(found))} beside {_few(named)}; {_ADVICE}")
    _refuse_copies(named)
    _refuse_kinds(tables(named))
    if "train.tsv" in splits.get("train", ()) and "test" in splits:
        splits["test"] = [name for name in splits["test"] if _is_test(path, name, label)]
    kept = {split: [n for n in names if _kind(Path(n))] for split, names in splits.items()}
    return {split: [path / name for name in names] for split, names in kept.items() if names}


def describes_itself(path: Path) -> bool:
    """Whether a directory's card says which files belong to it, or of which types their columns are."""
    card = path / "README.md"
    if not card.is_file():
        return (path / ".huggingface.yaml").is_file()
    return bool({"configs", "dataset_info"} & {*DatasetCard.load(card).data.to_dict()})


def load_files(splits: Mapping[str, Sequence[Path]]) -> Any:
    """Files of one kind as the splits of a dataset, read by datasets.

    datasets gives pictures no label where all are in one directory.
    """
    names = [file for files in splits.values() for file in files]
    pictures = [file for file in names if _kind(file) == IMAGES]
    module, options = _EXTENSION_TO_MODULE[_unpacked((pictures or names)[0]).suffix.lower()]
    if pictures:
        options = {"drop_labels": False} if len({len(file.parts) for file in pictures}) == 1 else {}
    found = {split: _listed(files) for split, files in splits.items()}
    return load_dataset(module, data_files=found, cache_dir=str(cache_dir() / "datasets"), **options)


def parquet_files(splits: Mapping[str, Sequence[Path]]) -> Any:
    """The same of parquet files; of those without a row nothing but their columns.

    Raises:
        ValueError: two columns of one name.
    """
    kept: dict[str, list[Path]] = {}
    empty: dict[str, Dataset] = {}
    for split, files in splits.items():
        shapes = {file: pq.read_metadata(file) for file in files}
        for file, shape in shapes.items():
            names = shape.schema.to_arrow_schema().names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{file.name} has two columns {twice!r}, must have names of their own")
        full = [file for file, shape in shapes.items() if shape.num_rows]
        if full:
            kept[split] = full
        else:
            empty[split] = Dataset(shapes[files[0]].schema.to_arrow_schema().empty_table())
    return DatasetDict({**(load_files(kept) if kept else {}), **empty})


def _listed(files: Sequence[Path]) -> DataFilesList:
    """Files as datasets lists them once patterns are resolved: a file that changes is read anew."""
    states = [file.stat() for file in files]
    places = [str(file.absolute()) for file in files]
    return DataFilesList(places, [(str(state.st_mtime_ns), str(state.st_size)) for state in states])


def _candidates(path: Path) -> Iterator[str]:
    """Names of data files below a directory, in order; nothing that is hidden, a backup or about the data."""
    glue, seen = (path / "train.tsv").is_file(), set()
    for place, folders, files in os.walk(path, followlinks=True):
        below = Path(place).relative_to(path)
        folders[:] = sorted(folder for folder in folders if not folder.startswith((".", "__")))
        if os.path.realpath(place) in seen:  # a link to a directory above
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        if glue and not below.parts and "original" in folders:
            folders.remove("original")
        for name in sorted(files):
            aside = name in FILES_TO_IGNORE or (glue and name in GLUE_ASIDE) or name.startswith((".", "~"))
            if not aside and _module(PurePath(name)) and (Path(place) / name).is_file():
                yield (below / name).as_posix()


def _splits(names: Sequence[str]) -> dict[str, list[str]]:
    """Split -> its files, by the patterns that datasets has for names."""

    def matching(pattern: str) -> list[str]:
        rule = re.compile(glob_translate(f"/{pattern}"))
        return [name for name in names if rule.match(f"/{name}")]

    if not names:
        return {}
    patterns = _get_data_files_patterns(matching)
    return {
        str(split): list(dict.fromkeys(name for pattern in of for name in matching(pattern)))
        for split, of in patterns.items()
    }


def _refuse_copies(names: Sequence[str]) -> None:
    plain: dict[str, str] = {}
    for name in names:
        other = plain.setdefault(_unpacked(PurePath(name)).as_posix(), name)
        if other != name:
            raise ValueError(f"holds {other!r} and {name!r}, which are compressed copies; {_ADVICE}")


def _refuse_kinds(names: Sequence[str]) -> None:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(Path(name)), []).append(name)
    if len(kinds) > 1:
        raise ValueError(
            f"holds files of {len(kinds)} kinds: {'; '.join(map(_few, kinds.values()))}; {_ADVICE}"
        )


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more


def _kind(file: PurePath) -> str:
    """What a file is read as: an ending or `IMAGES`; empty for what tables are not kept in."""
    ending: str = _unpacked(file).suffix.lower()
    if ending in DELIMITERS or ending == PARQUET:
        return ending
    if ending in JSON:
        return JSON[0]
    return IMAGES if _module(file) == "imagefolder" else ""


def _module(file: PurePath) -> str:
    """The module of datasets that reads a file; empty where none does, as of backups."""
    module: str = _EXTENSION_TO_MODULE.get(_unpacked(file).suffix.lower(), ("",))[0]
    return module


def _unpacked(file: Any) -> Any:
    """The name of a file without the ending that compression adds."""
    return file.with_suffix("") if file.suffix.lower() in PACKED else file


def _is_test(path: Path, name: str, label: str) -> bool:
    """Whether a test file has labels, or all that the training file has: those of GLUE have neither."""
    if name not in GLUE_TESTS:
        return True
    found, wanted = {*column_names(".tsv", path / name)}, {*column_names(".tsv", path / "train.tsv")}
    return wanted <= found or (label != "" and {*columns_named(label, found)} <= found)
