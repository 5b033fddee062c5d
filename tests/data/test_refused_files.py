"""Data files that cannot be what they should be are refused in one line, with the row or the line."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import DataConfig
from fedlora.data.columns import Columns
from fedlora.data.sources import RawData, load_examples
from fedlora.data.targets import REGRESSION
from fedlora.errors import ConfigError
from tests.data.strangers import damaged, jsonl, read, refused, rows


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["neg", "pos", 1], "row 3 .* holds the number 1, before it are texts"),
        ([1, "1"], "row 2 .* holds the text '1', before it are whole numbers"),
        ([True, "true"], "row 2 .* holds the text 'true', before it are truth values"),
        ([1, True], "row 2 .* holds the truth value true, before it are whole numbers"),
        (["a", ["b"]], r"row 2 .* holds the list \[\"b\"\]"),
        ([1, 0.5], "row 2 .* holds the number 0.5"),
        ([1, 1e300], "row 2 .* holds the number 1e"),
        (["a", "\ud800"], "row 2 .* holds half of a surrogate pair"),
        (["a", "\u00a0"], "1 empty in .*, the first in row 2"),
        ([1, float("nan")], "1 empty in .*, the first in row 2"),
    ],
)
@pytest.mark.parametrize("column", ["label", "who"])
def test_what_is_no_name_is_refused_with_its_row(
    labels: list[Any], message: str, column: str, tmp_path: Path, cache: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "t", "label": "x", "who": "y", column: v} for v in labels])
    with pytest.raises(ConfigError, match=message):
        read(path)


@pytest.mark.parametrize("odd", [404, 1.5, True, ["a"], {"a": 1}])
def test_what_is_no_text_is_refused_with_its_row(odd: Any, tmp_path: Path, cache: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*rows(["a", "b"] * 4), {"text": odd, "label": "a", "who": "a"}])
    assert "data.text-column = 'text': row 9 of" in refused(path)


def targets(path: Path, label: str) -> RawData:
    config = DataConfig(name=str(path), label_column=label, partitioner="iid", num_partitions=1)
    return load_examples(config, replace(Columns.of(config), targets=REGRESSION))


@pytest.mark.parametrize("odd", [10**400, -(10**400), 1e39, "1e400", "9" * 500])
def test_a_number_that_32_bits_do_not_hold_is_refused_with_its_row(
    odd: Any, tmp_path: Path, cache: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", rows([1, 2, odd]))
    with pytest.raises(ConfigError, match=r"row 3 of .*, must be a finite number of 32 bits") as caught:
        targets(path, "label")
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize(("label", "names"), [("good, bad", ("good, bad",)), ("one, two", ("one", "two"))])
def test_a_column_of_targets_may_be_named_letter_for_letter(
    label: str, names: tuple[str, ...], tmp_path: Path, cache: Path
) -> None:
    many = [{"text": f"t {i}", "good, bad": i, "one": -i, "two": 0} for i in range(10)]
    raw = targets(jsonl(tmp_path / "a.jsonl", many), label)
    assert raw.label_names == names
    assert {abs(row[0]) for row in [*raw.train["targets"], *raw.test["targets"]]} == {*range(10)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label,who\na,b\n", "line 2 has 2 fields, the header has 3"),
        ("a.csv", b"text,label,who\na,b,c,d\n", "line 2 has 4 fields"),
        ("a.csv", b'text,label,who\n"a,b,c\nd,e,f\n', "line 3: unexpected end"),
        (
            "a.csv",
            b"text,label,label,who\na,b,c,d\n",
            r"no such column .* label \(column 2\), label \(column 3\)",
        ),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", "text,label,who\na,b,c\né,b,c\n".encode("latin-1"), "line 3 is not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": "b", "who": "c"}\n{"text": "a", "la', "line 2: "),
        ("a.jsonl", b'\n{"text": "a"}\n[1]\n', "line 3 is no object"),
        ("a.jsonl", b'{"text": "a", "label": "b", "label": "c"}\n', "line 1: names the key 'label' twice"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"text": "a"}, 3]', "entry 2 is no object"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 500, mtime=0)[:-20], "cannot be read"),
        ("a.csv.gz", b"text,label,who\n", "cannot be read"),
        ("a.csv.gz", damaged(b"text,label,who\n" + b"a,b,c\n" * 5), "cannot be read .*decompressing"),
        ("a.jsonl.gz", damaged(b'{"text": "a"}\n' * 5), "cannot be read .*decompressing"),
    ],
)
def test_files_that_are_broken_are_refused_with_the_line(
    name: str, content: bytes, message: str, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)
