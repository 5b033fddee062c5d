"""A node's own examples: the tokens and labels that the run would give them, and nothing told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from clients.evaluation import evaluate
from fedlora.errors import ConfigError, OwnDataRefused
from fedlora.prepared.cache import open_prepared, prepare
from fedlora.prepared.node_data import OwnData, own_data, read_own
from fedlora.tasks import task_named
from tests.conftest import tiny_config
from tests.in_process import client_runtime

ROWS = [
    {"text": f"{word} film number {i}", "label": label, "domain": domain}
    for i, (word, label, domain) in enumerate(
        [("good", "pos", "a"), ("bad", "neg", "a"), ("fine", "pos", "b"), ("poor", "neg", "b")] * 6
    )
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def own(tmp_path: Path, rows: list[dict[str, Any]], **more: Any) -> OwnData:
    keys = {"dataset_id": "mine", "partition_id": 1, "labels": ("neg", "pos"), "home": tmp_path / "home"}
    return OwnData(path=write(tmp_path / "own.jsonl", rows), **{**keys, **more})


def test_own_examples_are_what_the_same_rows_are_as_a_partition(tmp_path: Path, cache: Path) -> None:
    everything = write(tmp_path / "all.jsonl", ROWS)
    config = tiny_config(
        **{
            "data.name": everything,
            "data.test": write(tmp_path / "test.jsonl", ROWS[:4]),
            "data.domain-column": "domain",
        }
    )
    whole = open_prepared(prepare(config))
    rows = [{"text": row["text"], "label": row["label"]} for row in ROWS if row["domain"] == "b"]
    mine = own_data(own(tmp_path, rows), "tiny", config.data.max_length)
    assert mine.label_names == whole.label_names
    theirs, ours = whole.indices(1), mine.indices(1)
    assert len(ours) == len(theirs) == 12
    for i, j in zip(ours, theirs, strict=True):
        assert np.array_equal(mine.train.input_ids(i), whole.train.input_ids(j))
        assert mine.train.labels[i] == whole.train.labels[j]
    assert len(mine.indices(0)) == 0


def test_a_node_without_some_of_the_labels_keeps_the_runs_numbers(tmp_path: Path, cache: Path) -> None:
    mine = own_data(own(tmp_path, [r for r in ROWS if r["label"] == "pos"]), "tiny", 64)
    assert set(mine.train.labels) == {1}
    assert mine.num_labels == 2


def test_a_csv_file_with_some_of_the_labels_agrees_with_the_run(tmp_path: Path, cache: Path) -> None:
    """Its cells alone look like numbers; the run's labels show that they are not."""
    (tmp_path / "own.csv").write_text("text,label\n" + "a film,07\nanother film, 12\n" * 4)
    labels = ("07", "12", "7", "A3")
    mine = OwnData(
        path=str(tmp_path / "own.csv"), dataset_id="x", partition_id=0, labels=labels, home=tmp_path / "home"
    )
    assert own_data(mine, "tiny", 64).train.labels.tolist() == [0, 1] * 4


def test_a_label_that_the_run_does_not_know_is_refused_and_only_its_owner_is_told_which(
    tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(OwnDataRefused, match="'leukaemia'") as caught:
        own_data(own(tmp_path, [*ROWS, {"text": "x", "label": "leukaemia"}]), "tiny", 64)
    assert caught.value.told == (
        "this node's data has labels that the run does not know, the run's labels are 'neg', 'pos'"
    )


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"words": "x", "label": "pos"}], "text-column = 'text'"),
        ([{"text": "x", "class": "pos"}], "label-column = 'label'"),
        ([{"text": "x", "label": "pos"}, {"text": " ", "label": "neg"}], "1 empty"),
        ([{"text": 3, "label": "pos"}], "must be text"),
    ],
)
def test_data_that_cannot_be_used_is_named_to_its_owner_alone(
    rows: list[dict[str, Any]], named: str, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(OwnDataRefused) as caught:
        read_own(own(tmp_path, rows))
    assert named in str(caught.value)
    assert "data.text" not in str(caught.value)
    assert str(tmp_path) not in caught.value.told


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    gone = OwnData(path=str(tmp_path / "gone.jsonl"), dataset_id="x", partition_id=0, home=tmp_path)
    with pytest.raises(OwnDataRefused, match="no such file"):
        read_own(gone)


def test_a_dataset_directory_with_named_classes_and_a_split_of_its_own(tmp_path: Path, cache: Path) -> None:
    from datasets import DatasetDict

    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    rows = {"text": ["good", "bad", "fine"], "label": [0, 1, 0]}
    parts = {name: Dataset.from_dict(rows, features=features) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    mine = own_data(
        OwnData(
            path=str(tmp_path / "saved"),
            dataset_id="x",
            partition_id=0,
            labels=("neg", "pos"),
            home=tmp_path / "h",
        ),
        "tiny",
        64,
    )
    assert mine.train.labels.tolist() == [1, 0, 1]
    assert len(mine.test) == 3


def test_examples_are_held_out_only_where_the_owner_says_so(tmp_path: Path, cache: Path) -> None:
    assert read_own(own(tmp_path, ROWS)).test is None
    table = read_own(own(tmp_path, ROWS, test_fraction=0.25))
    assert table.test is not None
    assert (len(table.train), len(table.test)) == (18, 6)


def test_without_test_examples_a_personal_model_cannot_be_measured(tmp_path: Path, cache: Path) -> None:
    runtime = client_runtime(tiny_config(), own(tmp_path, ROWS))
    assert runtime.data.declared == "mine"
    with pytest.raises(ConfigError, match="no example to evaluate on"):
        evaluate(runtime.model, runtime.data.test, np.arange(len(runtime.data.test)), 0)


TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": role, "content": f"It is {i}."} for role in ("user", "assistant")]}
    for i in range(6)
]
PAIRS = [{"prompt": f"Number {i}?", "response": f"It is {i}."} for i in range(6)]


@pytest.mark.parametrize(
    ("task", "columns", "rows"),
    [
        ("causal-lm", "text", [{"text": f"{i} words and a few more of them"} for i in range(9)]),
        ("instruction", "messages", TALKS),
        ("instruction", "prompt,response", PAIRS),
    ],
)
def test_texts_and_talks_are_what_the_same_rows_are_as_a_run(
    task: str, columns: str, rows: list[dict[str, Any]], tmp_path: Path, cache: Path
) -> None:
    name = write(tmp_path / "all.jsonl", rows)
    keys = {"data.partitioner": "iid", "data.num-partitions": 1, "data.max-length": 64}
    config = tiny_config(
        **{"task": task, "model.name": "tiny-lm", "data.name": name, "data.test": name, **keys},
        **{"data.text-column": columns},
    )
    whole = open_prepared(prepare(config))
    theirs = own(tmp_path, rows, labels=(), text_column=columns, label_column="")
    assert read_own(theirs).labels == {}
    mine = client_runtime(config, theirs).data
    assert mine.label_names == ()
    assert mine.task == task
    assert len(mine.train) == len(whole.train) > 2
    for i in range(len(mine.train)):
        assert np.array_equal(mine.train.input_ids(i), whole.train.input_ids(i))
    if task == "instruction":
        assert mine.train.counted is not None
        assert whole.train.counted is not None
        assert np.array_equal(mine.train.counted, whole.train.counted)


def test_texts_without_labels_keep_a_test_split_of_their_own(tmp_path: Path, cache: Path) -> None:
    from datasets import DatasetDict

    parts = {name: Dataset.from_dict({"text": [f"a {name} text"] * 3}) for name in ("train", "test")}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    mine = OwnData(
        path=str(tmp_path / "saved"), label_column="", dataset_id="x", partition_id=0, home=tmp_path
    )
    for table in (read_own(mine), read_own(mine, task_named("causal-lm"))):
        assert table.test is not None
        assert table.test["text"].to_pylist() == ["a test text"] * 3


def test_a_talk_that_is_none_is_named_to_its_owner_alone(tmp_path: Path, cache: Path) -> None:
    config = tiny_config(**{"task": "instruction", "model.name": "tiny-lm"})
    rows = [*TALKS, {"messages": [{"role": "patient", "content": "It hurts."}]}]
    with pytest.raises(OwnDataRefused, match="role 'patient'"):
        read_own(own(tmp_path, rows, text_column="messages", label_column=""))
    with pytest.raises(OwnDataRefused, match="role 'patient'") as refused:
        client_runtime(config, own(tmp_path, rows, text_column="messages", label_column=""))
    assert "patient" not in refused.value.told


def test_a_run_that_learns_labels_needs_some(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(OwnDataRefused, match="label-column = '': classification learns labels"):
        own_data(own(tmp_path, ROWS, label_column=""), "tiny", 64)


def test_changed_examples_are_read_anew(tmp_path: Path, cache: Path) -> None:
    before = own_data(own(tmp_path, ROWS), "tiny", 64)
    after = own_data(own(tmp_path, ROWS[:8]), "tiny", 64)
    assert (len(before.train), len(after.train)) == (24, 8)
