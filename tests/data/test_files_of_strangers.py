"""The law of data files: what a file says is what is trained, or the run is refused with the row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.config import DataConfig
from fedlora.data.sources import load_examples
from fedlora.errors import ConfigError
from tests.data.strangers import KEYS, csv_file, jsonl, read, refused, rows, said

LAW = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECE = 10_000


# --- laws ----------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=12)
words = texts.filter(lambda text: text.strip() and pa.compute.utf8_trim_whitespace(text).as_py())
looks_typed = st.sampled_from(
    ["07", "7", "1.0", "1", "True", "true", "NA", "null", "None", "inf", "nan", "1e3", "-1"]
)
names = st.one_of(looks_typed, words)
blanks = st.sampled_from(["", " ", "\t", "\u00a0", "  \u3000"])
records = st.lists(st.tuples(words, names, names), min_size=1, max_size=8)


def trimmed(name: str) -> str:
    found: str = pa.compute.utf8_trim_whitespace(name).as_py()
    return found


@LAW
@given(
    records, st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.sampled_from(["\n", "\r\n"]), blanks,
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.booleans(),
)  # fmt: skip
def test_a_csv_file_says_what_is_trained(
    tmp_path: Path, cache: Path,
    found: list[tuple[str, str, str]], encoding: str, end: str, blank: str, quoting: Any, packed: bool,
) -> None:  # fmt: skip
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end, quoting=quoting)
    writer.writerows([["text", "label", "who"], *([t, blank + a, b + blank] for t, a, b in found)])
    content = text.getvalue().encode(encoding)
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    assert said(read(path)) == [(t, trimmed(a), trimmed(b)) for t, a, b in found]


values = st.one_of(
    names, st.integers(-5, 5), st.integers(10**17, 10**19), st.just([]),
    st.sampled_from([1.0, 2.0, 0.5, True, False, None]), st.just({"a": 1}), blanks,
)  # fmt: skip


def name_of(value: Any) -> tuple[str, str] | None:
    """Kind and name of a JSON value as `docs/tasks.md` has it; None where it is no name."""
    if isinstance(value, str):
        return ("text", trimmed(value)) if trimmed(value) else None
    if isinstance(value, bool):
        return "truth", str(value).lower()
    if isinstance(value, int | float) and value == int(value):
        return "number", str(int(value))
    return None


@LAW
@given(st.lists(st.tuples(values, values, values), min_size=1, max_size=5), st.booleans())
def test_a_json_file_says_what_is_trained_or_is_refused_with_the_row(
    tmp_path: Path, cache: Path, found: list[tuple[Any, Any, Any]], lines: bool
) -> None:
    written = [{"text": t, "label": a, "who": b, "else": t} for t, a, b in found]
    written = [{key: value for key, value in row.items() if value is not None} for row in written]
    path = tmp_path / "a.json"
    path.write_text(
        "".join(json.dumps(r) + "\n\n" for r in written) if lines else json.dumps(written, indent=1)
    )
    columns = [[name_of(row[column]) for row in found] for column in (1, 2)]
    one_kind = all(
        len({name[0] if name else "" for name in column}) == 1 and all(column) for column in columns
    )
    if one_kind and all(isinstance(t, str) and trimmed(t) for t, _, _ in found):
        expected = [(row[0], a[1], b[1]) for row, a, b in zip(found, *columns, strict=True) if a and b]
        assert said(read(path)) == expected
    else:
        assert re.search(r"row [1-5]\b|no such column", refused(path))


@LAW
@given(st.permutations([str(n) for n in range(6)] + ["07", "7.0"]))
def test_the_order_of_rows_decides_nothing(tmp_path: Path, cache: Path, order: list[str]) -> None:
    path = csv_file(tmp_path / "a.csv", [[f"text {label}", label, label] for label in order])
    raw = read(path)
    assert set(raw.label_names) == set(order)
    assert {text.removeprefix("text "): label for text, label, _ in said(raw)} == {n: n for n in order}


# --- the kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["07", "True", "1.0"])
def test_the_types_of_a_csv_file_are_not_guessed_piece_by_piece(
    name: str, tmp_path: Path, cache: Path
) -> None:
    labels = [[name, "A3"][i % 2] for i in range(PIECE)] + [name] * 50
    path = csv_file(tmp_path / "a.csv", [[f"t {i}", label, label] for i, label in enumerate(labels)])
    raw = read(path)
    assert set(raw.label_names) == {name, "A3"}
    assert set(raw.train["natural"]) == {name, "A3"}


@pytest.mark.parametrize("name", ["A.CSV", "a.Csv.GZ"])
def test_an_ending_may_be_in_capitals(name: str, tmp_path: Path, cache: Path) -> None:
    plain = csv_file(tmp_path / "plain.csv", [[f"t {i}", "ab"[i % 2], "w"] for i in range(20)])
    packed = gzip.compress(plain.read_bytes()) if name.endswith("GZ") else plain.read_bytes()
    (tmp_path / name).write_bytes(packed)
    assert read(tmp_path / name).train.to_list() == read(plain).train.to_list()


def test_one_odd_value_far_down_does_not_change_the_others(tmp_path: Path, cache: Path) -> None:
    many = rows(["neg", "pos"] * (PIECE // 2 + 20))
    many[PIECE + 10]["else"] = {"a": 1}
    assert said(read(jsonl(tmp_path / "a.jsonl", many)))[0] == ("text 0", "neg", "a")
    many[PIECE + 10]["label"] = 1
    assert f"row {PIECE + 11} of" in refused(jsonl(tmp_path / "b.jsonl", many))


def test_whole_numbers_and_truth_values_are_names(tmp_path: Path, cache: Path) -> None:
    for values, names in (([2, 1.0, 10, 1], ("1", "2", "10")), ([True, False], ("false", "true"))):
        raw = read(jsonl(tmp_path / "a.jsonl", rows(values)))
        assert raw.label_names == names


def test_keys_that_nobody_needs_are_ignored(tmp_path: Path, cache: Path) -> None:
    odd = [1, "a", [1], {"b": [None]}, None, 10**400, float("nan"), "\ud800"]
    many = [
        {**row, "else": value, f"own {i}": 1}
        for i, (row, value) in enumerate(zip(rows(["x", "y"] * 4), odd, strict=True))
    ]
    assert [row[1] for row in said(read(jsonl(tmp_path / "a.jsonl", many)))] == ["x", "y"] * 4


def test_huge_fields_and_line_ends_within_texts(tmp_path: Path, cache: Path) -> None:
    long, broken = "word " * 100_000, 'a "quoted"\r\nline\u2028and\x85more, with commas'
    path = csv_file(tmp_path / "a.csv", [[long, "x", "1"], [broken, "y", "2"]])
    assert [row[0] for row in said(read(path))] == [long, broken]
    path = jsonl(
        tmp_path / "a.jsonl",
        [{"text": t, "label": "xy"[i], "who": "1"} for i, t in enumerate([long, broken])],
    )
    assert [row[0] for row in said(read(path))] == [long, broken]


def test_names_that_look_alike_are_two(tmp_path: Path, cache: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    path = jsonl(tmp_path / "a.jsonl", rows([composed, decomposed]))
    with pytest.warns(UserWarning, match="look alike"):
        assert len(read(path).label_names) == 2


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (pa.array([2, 10, 2]), ("2", "10")),
        (pa.array([2.0, 10.0, 2.0], pa.float16()), ("2", "10")),
        (pa.array(["b", "a", "b "]).dictionary_encode(), ("a", "b")),
        (pa.array(["b", "a", "b"], pa.large_string()), ("a", "b")),
        (pa.array(["b", "a", "b"], pa.string_view()), ("a", "b")),
        (pa.array([True, False, True]), ("false", "true")),
        (pa.array([1, 2, 1], pa.decimal128(5, 2)), ("1.00", "2.00")),
        (pa.array([0, 86400, 0], pa.timestamp("s")).cast(pa.date32()), ("1970-01-01", "1970-01-02")),
        (pa.nulls(3), "3 empty in .*, the first in row 1"),
        (pa.array([1.0, float("nan"), 1.0]), "1 empty in .*, the first in row 2"),
        (pa.array([1.0, float("inf"), 1.0]), "row 2 of .* holds inf"),
        (pa.array([1.0, 1.5, 1.0]), "row 2 of .* holds 1.5"),
        (pa.array([[1], [2], [1]]), "holds list<"),
        (pa.array([b"a", b"\xff", b"a"]), "holds binary"),
    ],
)
def test_types_of_parquet_columns(column: pa.Array, names: Any, tmp_path: Path, cache: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "label": column, "who": ["x", "y", "x"]})
    pq.write_table(table, tmp_path / "a.parquet")
    if isinstance(names, tuple):
        assert read(tmp_path / "a.parquet").label_names == names
    else:
        with pytest.raises(ConfigError, match=names):
            read(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_files_of_a_directory_are_read_as_a_file_is(kind: str, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "d").mkdir()
    for part in ("train", "test"):
        path = tmp_path / "d" / f"{part}.{kind}"
        if kind == "csv":
            csv_file(path, [["a", "07", "01"], ["b", "7", "1"]])
        else:
            jsonl(
                path,
                [
                    {"text": "a", "label": "07", "who": "01", "n": 1},
                    {"text": "b", "label": "7", "who": "1", "n": "x"},
                ],
            )
    raw = load_examples(DataConfig(name=str(tmp_path / "d"), **KEYS))
    assert said(raw) == [("a", "07", "01"), ("b", "7", "1")]


def test_a_test_split_without_labels_is_none(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "d").mkdir()
    csv_file(tmp_path / "d" / "train.csv", [[f"t {i}", "xy"[i % 2], "ab"[i % 2]] for i in range(20)])
    csv_file(tmp_path / "d" / "test.csv", [["a", "", "a"], ["b", "-1", "b"]])
    raw = load_examples(DataConfig(name=str(tmp_path / "d"), **{**KEYS, "test_fraction": 0.5}))
    assert len(raw.train) + len(raw.test) == 20


def test_a_directory_that_says_how_its_files_are_read_is_read_so(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "d").mkdir()
    about = "configs:\n- config_name: default\n  data_files: [{split: train, path: a.csv}]\n  sep: ';'\n"
    (tmp_path / "d" / "README.md").write_text(f"---\n{about}---\n")
    (tmp_path / "d" / "a.csv").write_text("text;label;who\n" + "a, b;x;1\nc;y;2\n")
    config = DataConfig(
        name=str(tmp_path / "d"), test=str(csv_file(tmp_path / "t.csv", [["t", "x", "1"]])), **KEYS
    )
    assert said(load_examples(config)) == [("a, b", "x", "1"), ("c", "y", "2")]


def test_a_directory_of_tabs(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "d").mkdir()
    for part in ("train", "test"):
        (tmp_path / "d" / f"{part}-0.tsv").write_text('text\tlabel\twho\n"a\t07\tx\nb\t7\tx\n')
    assert said(load_examples(DataConfig(name=str(tmp_path / "d"), **KEYS))) == [
        ('"a', "07", "x"),
        ("b", "7", "x"),
    ]
