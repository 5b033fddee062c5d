"""Files and directories as they lie at strangers': names are names, and no file is lost or read twice."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image

from fedlora.config import DataConfig
from fedlora.data.columns import Columns
from fedlora.data.sources import load_examples, open_source
from fedlora.errors import ConfigError


def rows(words: str, count: int, mark: str = ",") -> str:
    lines = [f"{words} number {i}{mark}{'ab'[i % 2]}" for i in range(count)]
    return "\n".join([f"text{mark}label", *lines]) + "\n"


def laid(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return folder


def parquet(path: Path, words: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [f"{words} {i}" for i in range(8)], "label": ["a", "b"] * 4}), path)
    return path


def found(path: Path) -> tuple[Dataset, Dataset | None]:
    return open_source(DataConfig(name=str(path)))


def texts(path: Path) -> set[str]:
    return {text.split()[0] for text in found(path)[0]["text"]}


def refusal(path: Path, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_examples(DataConfig(name=str(path), partitioner="iid", num_partitions=1, **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("reviews[1].parquet", "reviews1.parquet"),
        ("what?.parquet", "whatX.parquet"),
        ("a*.parquet", "ab.parquet"),
    ],
)
def test_the_name_of_a_file_is_no_pattern(name: str, beside: str, tmp_path: Path) -> None:
    parquet(tmp_path / name, "own")
    assert texts(tmp_path / name) == {"own"}
    parquet(tmp_path / beside, "other")
    assert (texts(tmp_path / name), len(found(tmp_path / name)[0])) == ({"own"}, 8)


@pytest.mark.parametrize("kind", ["csv", "parquet", "png"])
def test_the_name_of_a_directory_is_no_pattern(kind: str, tmp_path: Path) -> None:
    for name in ("data [v2]", "data v"):
        for label in "ab":
            path = tmp_path / name / label / f"r [1].{kind}"
            path.parent.mkdir(parents=True)
            if kind == "png":
                Image.new("L", (4, 4)).save(path)
            elif kind == "csv":
                path.write_text(rows(name.split()[1], 8))
            else:
                parquet(path, name.split()[1])
    table = found(tmp_path / "data [v2]")[0]
    assert len(table) == (2 if kind == "png" else 16)
    assert (
        table.features["label"].names == ["a", "b"]
        if kind == "png"
        else {*table["text"][0].split()} & {"[v2]"}
    )


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    assert texts(parquet(tmp_path / "a.parquet", "first")) == {"first"}
    assert texts(parquet(tmp_path / "a.parquet", "second")) == {"second"}


# --- what is read ------------------------------------------------------------------------------------------


def test_backups_and_hidden_files_are_not_read(tmp_path: Path) -> None:
    old = rows("old", 20)
    beside = [
        "r.csv.bak",
        "s.csv.bak",
        "r.csv~",
        ".r.csv",
        "~$r.csv",
        "r.csv.old",
        ".git/x.csv",
        "README.md",
        "notes.txt",
        "more.txt",
    ]
    laid(tmp_path, {"r.csv": rows("film", 8), **dict.fromkeys(beside, old)})
    assert (texts(tmp_path), len(found(tmp_path)[0])) == ({"film"}, 8)


def test_shards_and_links_to_directories_are_read(tmp_path: Path) -> None:
    laid(tmp_path / "d", {"jan.csv": rows("jan", 8), "sub/feb.csv": rows("feb", 8)})
    laid(tmp_path / "far", {"mar.csv": rows("mar", 8)})
    (tmp_path / "d" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    assert (texts(tmp_path / "d"), len(found(tmp_path / "d")[0])) == ({"jan", "feb", "mar"}, 24)


LINE = '{"text": "t", "label": "a"}\n'


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"r.csv": rows("f", 8), "a.jsonl": LINE, "b.jsonl": LINE}, "2 kinds: 'a.jsonl', 'b.jsonl'; 'r.csv'"),
        ({"train.tsv": rows("f", 8, "\t"), "train.csv": rows("f", 8)}, "2 kinds: 'train.csv'; 'train.tsv'"),
        ({"r.csv": rows("f", 8), "p.png": b"", "q.png": b""}, "2 kinds: 'p.png', 'q.png'; 'r.csv'"),
        ({"r.csv": rows("f", 8), "train.txt": "x\n"}, "holds 'r.csv' beside 'train.txt'"),
        ({"r.csv": rows("f", 8), "r.csv.gz": gzip.compress(b"t", mtime=0)}, "'r.csv' and 'r.csv.gz', which"),
        ({"r.csv.xz": b"", "r.csv.gz": b""}, "'r.csv.gz' and 'r.csv.xz', which are compressed copies"),
    ],
)  # fmt: skip
def test_kinds_that_hide_each_other_and_copies_are_refused(
    files: dict[str, str | bytes], said: str, tmp_path: Path
) -> None:
    message = refusal(laid(tmp_path, files))
    assert said in message
    assert message.endswith("name the file that is meant, or move the others away)")


def test_a_directory_of_texts_is_read_as_before(tmp_path: Path) -> None:
    laid(tmp_path, {"train.txt": "one\ntwo\n", "test.txt": "three\n"})
    train, test = open_source(DataConfig(name=str(tmp_path)), labelled=False)
    assert (train["text"][:], test and test["text"][:]) == (["one", "two"], ["three"])


def test_labels_of_pictures_may_stand_in_metadata(tmp_path: Path) -> None:
    laid(tmp_path, {"metadata.csv": "file_name,label\na.png,x\nb.png,y\n"})
    for name in "ab":
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    assert found(tmp_path)[0]["label"][:] == ["x", "y"]


# --- tests of tsv ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test.tsv", "validation.tsv", "dev.tsv", "test-0.tsv"])
def test_a_labelled_test_tsv_is_the_test_set(name: str, tmp_path: Path) -> None:
    laid(tmp_path, {"train.tsv": rows("film", 20, "\t"), name: rows("held", 6, "\t")})
    train, test = found(tmp_path)
    assert (len(train), len(test or ())) == (20, 6)
    assert len(open_source(DataConfig(name=str(tmp_path)), labelled=False)[1] or ()) == 6


def test_what_glue_ships_beside_its_examples_is_not_read(tmp_path: Path) -> None:
    aside = ["test.tsv", "test_matched.tsv", "test_mismatched.tsv"]
    laid(
        tmp_path,
        {
            "train.tsv": rows("film", 20, "\t"), "dev_matched.tsv": rows("held", 6, "\t"),
            "dev_mismatched.tsv": rows("far", 7, "\t"), "dev_ids.tsv": "1\t2\n",
            "original/x_train.jsonl": LINE, **dict.fromkeys(aside, "index\ttext\n0\ta\n"),
        },
    )  # fmt: skip
    for labelled in (True, False):
        train, test = open_source(DataConfig(name=str(tmp_path)), labelled=labelled)
        assert (len(train), len(test or ())) == (20, 6)


# --- parquet that is odd -----------------------------------------------------------------------------------


def test_parquet_without_rows_and_with_a_name_twice(tmp_path: Path) -> None:
    none = pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())})
    pq.write_table(none, tmp_path / "zero.parquet")
    assert refusal(tmp_path / "zero.parquet").endswith("zero.parquet' holds no examples")
    parquet(tmp_path / "part.parquet", "own")
    assert len(found(tmp_path)[0]) == 8
    twice = pa.table([pa.array(["a"]), pa.array(["x"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "dup.parquet")
    assert "dup.parquet has two columns 'text'" in refusal(tmp_path / "dup.parquet")


# --- names of columns --------------------------------------------------------------------------------------

ODD = ["How was it, really?", "review ", "one, two, three, four"]


@pytest.mark.parametrize("column", ODD)
def test_a_column_may_be_named_letter_for_letter(column: str, tmp_path: Path) -> None:
    said = [f"text {i}" for i in range(20)]
    pq.write_table(pa.table({column: said, "label": ["a", "b"] * 10}), tmp_path / "a.parquet")
    keys: dict[str, Any] = {"text_column": column, "partitioner": "iid", "num_partitions": 1}
    raw = load_examples(DataConfig(name=str(tmp_path / "a.parquet"), **keys))
    assert {*raw.train["text"], *raw.test["text"]} == {*said}


def test_a_list_of_columns_is_one_where_no_column_is_called_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": ["x"], "b": ["y"], "label": ["z"]}), tmp_path / "a.parquet")
    assert "data.text-column = 'a, c': no such" not in refusal(tmp_path / "a.parquet", text_column="a, c")
    assert "must name one column, or two" in refusal(tmp_path / "a.parquet", text_column="a,b,label")
    assert "must name one column, or two" in refusal(tmp_path / "a.parquet", text_column=" , ")


def test_conversations_are_of_three_columns_at_most() -> None:
    four = Columns(("a", "b", "c", "d"), "", "", "", natural="", conversations=True, written="a,b,c,d")
    with pytest.raises(ConfigError, match=r"data\.text-column = 'a,b,c,d': must name one column"):
        four.settled(["a", "b", "c", "d"])
