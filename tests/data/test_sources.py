from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fedlora.config import DataConfig
from fedlora.data import sources
from fedlora.data.sources import KINDS_OF_FILES, RawData, load_examples, open_source
from fedlora.data.split import normalised
from fedlora.errors import AssetError, ConfigError
from tests.wire.mutations import TOUCHED, Trap

# datasets leaves the csv file it has read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

ROWS = [
    {"body": f"note number {i}", "mood": ["sad", "glad"][i % 2], "writer": i // 4, "place": "xy"[i // 20]}
    for i in range(40)
]
COLUMNS: dict[str, Any] = {
    "text_column": "body",
    "label_column": "mood",
    "group_column": "writer",
    "domain_column": "place",
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    table = Dataset.from_list(rows)
    if path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(table: Dataset) -> set[str]:
    return {normalised(text) for text in table["text"]}


def refusal(config: DataConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load_examples(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_file_formats_give_the_same_examples(tmp_path: Path, name: str) -> None:
    raw = load_examples(DataConfig(name=write(tmp_path / name, ROWS), **COLUMNS))
    assert raw.label_names == ("glad", "sad")
    assert raw.train.column_names == ["text", "label", "domain", "group"]
    assert len(raw.train) + len(raw.test) == 40
    found = {row["text"]: row for row in [*raw.train, *raw.test]}
    for row in ROWS:
        kept = found[row["body"]]
        assert raw.label_names[kept["label"]] == row["mood"]
        assert (kept["domain"], kept["group"]) == (row["place"], str(row["writer"]))


def test_groups_and_duplicates_do_not_cross_the_split(tmp_path: Path) -> None:
    rows = [{**row, "body": "Same words!" if i in (0, 39) else row["body"]} for i, row in enumerate(ROWS)]
    for fraction in (0.1, 0.3, 0.5, 0.7):
        config = DataConfig(
            name=write(tmp_path / f"{fraction}.jsonl", rows), test_fraction=fraction, **COLUMNS
        )
        raw = load_examples(config)
        assert not set(raw.train["group"]) & set(raw.test["group"])
        assert not words(raw.train) & words(raw.test)


def test_every_domain_is_held_out_alike(tmp_path: Path) -> None:
    raw = load_examples(DataConfig(name=write(tmp_path / "a.jsonl", ROWS), **COLUMNS))
    assert Counter(raw.test["domain"]) == {"x": 4, "y": 4}


def test_whole_number_labels_in_numeric_order(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": [2, 10][i % 2]} for i in range(10)]
    raw = load_examples(DataConfig(name=write(tmp_path / "a.csv", rows), partitioner="iid", num_partitions=1))
    assert raw.label_names == ("2", "10")


def test_pairs(tmp_path: Path) -> None:
    rows = [{"text": f"a{i}", "then": f"b{i}", "label": i % 2} for i in range(10)]
    config = DataConfig(
        name=write(tmp_path / "a.jsonl", rows), text_column="text, then", partitioner="iid", num_partitions=1
    )
    raw = load_examples(config)
    assert all(row["text"][1:] == row["text_pair"][1:] for row in [*raw.train, *raw.test])


def test_texts_that_pandas_takes_for_missing_stay_texts(tmp_path: Path) -> None:
    rows = [
        {"text": text, "label": i % 2} for i, text in enumerate(["NA", "None", "null", "nan", "good", "bad"])
    ]
    raw = load_examples(DataConfig(name=write(tmp_path / "a.csv", rows), partitioner="iid", num_partitions=1))
    assert sorted([*raw.train["text"], *raw.test["text"]]) == sorted(str(row["text"]) for row in rows)


def test_a_test_file_wins_and_nothing_is_held_out(tmp_path: Path) -> None:
    test = write(tmp_path / "test.csv", ROWS[:6])
    raw = load_examples(DataConfig(name=write(tmp_path / "a.jsonl", ROWS), test=test, **COLUMNS))
    assert (len(raw.train), len(raw.test)) == (40, 6)


def test_validation_is_a_part_of_what_was_training_data_and_the_test_set_stays_unseen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    whole = load_examples(DataConfig(name=path, **COLUMNS))
    tuning = load_examples(DataConfig(name=path, validation_fraction=0.25, **COLUMNS))
    assert words(tuning.train) | words(tuning.test) == words(whole.train)
    assert not set(tuning.train["group"]) & set(tuning.test["group"])
    assert Counter(tuning.test["domain"]) == {"x": 4, "y": 4}


def test_a_natural_column_of_its_own_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    raw = load_examples(DataConfig(name=path, text_column="body", label_column="mood", partition_by="place"))
    assert raw.train.column_names == ["text", "label", "natural"]


def saved(tmp_path: Path, labels: dict[str, list[int]]) -> str:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["minus", "plus"])})
    splits = {
        name: Dataset.from_dict(
            {"text": [f"{name} {i}" for i in range(len(values))], "label": values}, features=features
        )
        for name, values in labels.items()
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


@pytest.mark.parametrize("hidden", [False, True])
def test_own_test_split_unless_its_labels_are_hidden(tmp_path: Path, hidden: bool) -> None:
    test = [-1, -1, -1] if hidden else [0, 1, 1]
    path = saved(tmp_path, {"train": [0, 1, 0, 1], "test": test, "validation": [1, 0]})
    raw = load_examples(DataConfig(name=path, partitioner="iid", num_partitions=1))
    assert raw.label_names == ("minus", "plus")
    assert len(raw.train) == 4
    assert len(raw.test) == (2 if hidden else 3)
    assert all(text.startswith("validation" if hidden else "test") for text in raw.test["text"])


def test_a_directory_of_files(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.jsonl", ROWS)
    write(tmp_path / "d" / "test.jsonl", ROWS[:8])
    raw = load_examples(DataConfig(name=str(tmp_path / "d"), **COLUMNS))
    assert (len(raw.train), len(raw.test)) == (40, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_column": "txt"}, "data.text-column = 'txt': no such column in .*body, mood, writer, place"),
        ({"text_column": "a,b,c"}, "data.text-column = 'a,b,c'"),
        (
            {"text_column": "writer"},
            "data.text-column = 'writer': row 1 of .* holds the number 0, must be text",
        ),
        ({"label_column": "lab"}, "data.label-column = 'lab': no such column"),
        ({"group_column": "grp"}, "data.group-column = 'grp': no such column"),
        ({"partition_by": "shop"}, "data.partition-by = 'shop': no such column"),
        ({"subset": "sst2"}, "data.subset = 'sst2'"),
        ({"test": "nowhere.csv"}, "data.test = 'nowhere.csv': no such file"),
        ({"name": "nowhere.csv"}, "data.name = 'nowhere.csv': no such file"),
        ({"name": "/no/where"}, "data.name = '/no/where': no such file"),
    ],
)
def test_refusals_name_key_value_and_way_out(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    message = refusal(DataConfig(**{"name": path, **COLUMNS, **change}))
    assert re.search(said, message), message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, 1.5, 1], "row 2 of .* holds the number 1.5"),
        (["a", "b", None], "1 empty in .*the first in row 3"),
        (["a", " ", "b"], "1 empty in .*the first in row 2"),
        ([[1], [2], [1]], r"row 1 of .* holds the list \[1\]"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, values: list[Any], said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "label": value}) + "\n" for value in values))
    with pytest.raises(ConfigError, match=f"data.label-column = 'label': .*{said}"):
        load_examples(DataConfig(name=str(path), partitioner="iid", num_partitions=1))


def test_a_test_label_unknown_to_train(tmp_path: Path) -> None:
    test = write(tmp_path / "t.jsonl", [{**ROWS[0], "mood": "odd"}])
    assert "'odd'" in refusal(DataConfig(name=write(tmp_path / "a.jsonl", ROWS), test=test, **COLUMNS))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken, empty, other = tmp_path / "b.jsonl", tmp_path / "e.csv", tmp_path / "o.xls"
    broken.write_text('{"text": "a", \n')
    empty.write_text("text,label\n")
    other.write_text("x")
    assert "cannot be read" in refusal(DataConfig(name=str(broken)))
    assert refusal(DataConfig(name=str(empty), partition_by="label"))
    assert "files must end in .jsonl" in refusal(DataConfig(name=str(other)))


def test_one_group_cannot_be_split(tmp_path: Path) -> None:
    rows = [{**row, "writer": 1} for row in ROWS]
    path = write(tmp_path / "a.jsonl", rows)
    assert "data.test-fraction" in refusal(DataConfig(name=path, **COLUMNS))
    held = {"test": write(tmp_path / "test.csv", rows[:6]), "validation_fraction": 0.3}
    assert "data.validation-fraction" in refusal(DataConfig(name=path, **held, **COLUMNS))


@pytest.mark.parametrize("kind", sorted(KINDS_OF_FILES))
def test_a_kind_of_files_is_no_dataset(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be read whatever lies where the process works: at a node its key, and pickles as such."""
    monkeypatch.chdir(tmp_path)
    for name in ("key", "train.json", "a.csv"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(
        ConfigError, match=f"data.name = '{kind}': is a kind of files and no dataset, name the"
    ):
        open_source(DataConfig(name=kind))
    assert TOUCHED == []


@pytest.mark.parametrize("name", ["text", "./text", "pandas"])
def test_a_directory_that_is_called_like_a_kind_of_files_is_that_directory(
    name: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.csv").write_text("text,label\nbeside,x\n")
    (tmp_path / name).mkdir()
    (tmp_path / name / "own.csv").write_text("text,label\nown,x\n")
    assert open_source(DataConfig(name=name))[0]["text"][:] == ["own"]


def test_a_hub_dataset_that_names_files_of_this_machine_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(data_files={"train": ["hf://datasets/a/b/x.csv", "/opt/fedlora/node-0/key"]})
    monkeypatch.setattr(sources, "load_dataset_builder", lambda *_, **__: SimpleNamespace(config=config))
    with pytest.raises(ConfigError, match=r"data.name = 'a/b': .*its description .* files of this machine"):
        open_source(DataConfig(name="a/b"))


def test_no_hub_is_an_asset_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match=r"sentimnt.*not built in"):
        load_examples(DataConfig(name="sentimnt"))


def test_synthetic_is_always_the_same_and_skewed_by_domain() -> None:
    first, second = load_examples(DataConfig(name="synthetic")), load_examples(DataConfig(name="synthetic"))
    assert first.train["text"] == second.train["text"]
    assert len(first.label_names) == 4
    assert len(set(first.train["domain"])) == 4
    assert not set(first.train["group"]) & set(first.test["group"])


def test_synthetic_can_be_learnt_from_words() -> None:
    raw = load_examples(DataConfig(name="synthetic"))
    assert word_count_accuracy(raw) > 0.9


def word_count_accuracy(raw: RawData) -> float:
    """Naive Bayes on words: the label whose training texts use the words of a text most."""
    counts: dict[str, np.ndarray] = {}
    for text, label in zip(raw.train["text"], raw.train["label"], strict=True):
        for word in text.split():
            counts.setdefault(word, np.full(len(raw.label_names), 0.5))[label] += 1
    unknown = np.ones(len(raw.label_names))
    hits = [
        int(
            np.argmax(sum(np.log(c / c.sum()) for c in (counts.get(w, unknown) for w in text.split())))
            == label
        )
        for text, label in zip(raw.test["text"], raw.test["label"], strict=True)
    ]
    return float(np.mean(hits))


@pytest.mark.real("sentiment")
def test_sentiment_counts_and_no_leak() -> None:
    raw = load_examples(DataConfig(name="sentiment"))
    labels = np.bincount([*raw.train["label"], *raw.test["label"]])
    assert raw.label_names == ("negative", "positive")
    assert labels.tolist() == [9029, 10107]
    assert not set(raw.train["group"]) & set(raw.test["group"])
    assert not words(raw.train) & words(raw.test)
    train, test = Counter(raw.train["domain"]), Counter(raw.test["domain"])
    assert set(train) == {"amazon", "movie", "nyt", "tweets"}
    for domain in train:
        assert test[domain] / (train[domain] + test[domain]) == pytest.approx(0.2, abs=0.001)


@pytest.mark.real("newsgroups")
def test_newsgroups_counts_and_no_leak() -> None:
    raw = load_examples(DataConfig(name="newsgroups"))
    assert (len(raw.train), len(raw.test), len(raw.label_names)) == (11278, 7510, 20)
    assert not set(raw.train["text"]) & set(raw.test["text"])
    assert set(raw.train["domain"]) == {"alt", "comp", "misc", "rec", "sci", "soc", "talk"}
    assert min(len(text.split()) for text in [*raw.train["text"], *raw.test["text"]]) >= 5


def test_a_directory_as_glue_ships_it(tmp_path: Path, cache: Path) -> None:
    """Tabs, quotes that are characters, a test.tsv without labels."""
    head = "index\tsentence1\tsentence2\tlabel"
    rows = [f'{k}\tHe said "yes{k}\tNone\t{"entailment" if k % 2 else "not_entailment"}' for k in range(8)]
    (tmp_path / "train.tsv").write_text("\n".join([head, *rows]) + "\n")
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows[:4]]) + "\n")
    (tmp_path / "test.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    keys = {"text_column": "sentence1,sentence2", "partitioner": "iid", "num_partitions": 2}
    for name, test in ((tmp_path, ""), (tmp_path / "train.tsv", str(tmp_path / "dev.tsv"))):
        raw = load_examples(DataConfig(name=str(name), test=test, **keys))
        assert (len(raw.train), len(raw.test)) == (8, 4)
        assert raw.label_names == ("entailment", "not_entailment")
        assert raw.train[0] == {"text": 'He said "yes0', "text_pair": "None", "label": 1}


def test_an_unknown_label_is_told_with_the_file_that_has_it(tmp_path: Path) -> None:
    for name, label in (("train", "a"), ("test", "a"), ("far", "odd")):
        (tmp_path / f"{name}.csv").write_text(f"text,label\nx,a\ny,{label}\nz,b\n")
    files = {key: str(tmp_path / f"{key}.csv") for key in ("train", "test", "far")}
    sets = json.dumps({"far": files["far"]})
    config = DataConfig(
        name=files["train"], test=files["test"], evaluation_sets=sets, partitioner="iid", num_partitions=1
    )
    with pytest.raises(ConfigError, match=r"far\.csv' holds 'odd' in row 2"):
        load_examples(config)
