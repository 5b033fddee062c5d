"""The public API: the names are there, and do what the commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

import fedlora
from fedlora.config import DataConfig, from_keywords
from fedlora.data.sources import load_examples
from fedlora.study.library.given import settings_of
from fedlora.study.report.tables import write_tables
from tests.study.made_up import study

TINY = Path(__file__).parent.parent / "experiments" / "tiny.toml"


def test_every_public_name_can_be_had_and_nothing_heavy_comes_with_the_package() -> None:
    assert all(getattr(fedlora, name) is not None for name in fedlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = fedlora.train  # type: ignore[attr-defined]
    seen = "import sys, fedlora; print([n for n in ('torch', 'flwr', 'ray') if n in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_stand_ins_give_the_same_objects() -> None:
    import clients
    import fedlora.clients
    import fedlora.strategies
    import strategies

    for name in strategies.__all__:
        assert getattr(fedlora.strategies, name) is getattr(strategies, name)
    assert fedlora.clients.base_mod is clients.base_mod


def test_a_run_from_python_is_the_run_of_the_command(tmp_path: Path, cache: Path) -> None:
    told: list[dict[str, Any]] = []
    result = fedlora.run(
        str(TINY), tmp_path / "run", overrides={"num-server-rounds": 9, "seed": 3}, callback=told.append,
        num_server_rounds=1, engine="in-process",
    )  # fmt: skip
    assert told == result.records
    assert result.config.seed == 3
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.record == {key: value for key, value in written.items() if "sha256" not in key}
    assert result.rounds["round"].to_list() == [1]
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert fedlora.load_run(tmp_path / "run").record == result.record
    page = result.report()
    assert page == tmp_path / "run" / "report.html"
    assert "Accuracy after each round" in page.read_text()
    with pytest.raises(fedlora.ConfigError, match=r"nowhere\.csv': no such file"):
        result.evaluate("nowhere.csv")
    with pytest.raises(fedlora.ConfigError, match=r"nowhere\.csv': no such file"):
        result.evaluate(Path("nowhere.csv"))
    again = result.evaluate("synthetic")
    assert again["accuracy"] == result.record["accuracy"]


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fedlora.ConfigError, match=r"no finished run, there is no result\.json"):
        fedlora.load_run(tmp_path)
    with pytest.raises(fedlora.ConfigError, match=r"no study, there is no study\.json"):
        fedlora.load_study(tmp_path)


def test_a_configuration_may_be_keys_or_an_object(tmp_path: Path) -> None:
    for config in ({"lora.rank": 0}, fedlora.RunConfig()):
        with pytest.raises(fedlora.ConfigError, match=r"lora\.rank = 0"):
            fedlora.run(config, tmp_path / "none", overrides={"lora.rank": 0})
    assert not (tmp_path / "none").exists()


def test_values_of_numpy_and_paths_are_taken_for_what_they_stand_for() -> None:
    keys = {
        "num_server_rounds": np.int64(3),
        "train": {"learning_rate": np.float32(0.5)},
        "data": Path("a.csv"),
    }
    config = settings_of("fedlora.run", {"lora.rank": np.int32(2)}, {"seed": np.int64(7)}, keys)
    found = (
        config.num_server_rounds,
        config.train.learning_rate,
        config.data.name,
        config.lora.rank,
        config.seed,
    )
    assert found == (3, 0.5, "a.csv", 2, 7)


def test_keywords_are_the_keys_of_a_file(tmp_path: Path) -> None:
    keys = {"strategy": "flora", "lora": {"target_modules": ["query", "value"]}, "num_server_rounds": 2}
    assert from_keywords(keys) == {
        "strategy.name": "flora", "lora.target-modules": "query,value", "num-server-rounds": 2,
    }  # fmt: skip
    with pytest.raises(
        fedlora.ConfigError, match=r"lora\.rnak = 4: unknown key \(did you mean lora\.rank\?\)"
    ):
        fedlora.run(out=tmp_path / "none", lora={"rnak": 4})
    with pytest.raises(fedlora.ConfigError, match=r"strategy\.name = 'flor' \(did you mean flora\?\)"):
        fedlora.run({"strategy": {"name": "fedavg"}}, tmp_path / "none", strategy="flor")
    with pytest.raises(fedlora.ConfigError, match=r"fedlora\.run: out is missing"):
        fedlora.run(strategy="flora")
    assert not (tmp_path / "none").exists()


def test_what_a_callback_raises_ends_the_run_after_its_checkpoint(tmp_path: Path, cache: Path) -> None:
    def stop(record: dict[str, Any]) -> None:
        raise KeyError(record["round"])

    keys: dict[str, Any] = {"engine": "in-process", "num_server_rounds": 2}
    with pytest.raises(KeyError):
        fedlora.run(TINY, tmp_path / "run", callback=stop, **keys)
    told: list[int] = []
    fedlora.run(
        TINY, tmp_path / "run", resume=True, callback=lambda record: told.append(record["round"]), **keys
    )
    assert told == [2]


FRAME = pandas.DataFrame({"text": ["a"] * 60, "label": ["b"] * 60})
RESULT = fedlora.RunResult(path=Path("a"), config=fedlora.RunConfig(), record={}, records=[])
ONE = r"fedlora\.aggregate: adapters = "
API: Any = fedlora
WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: API.aggregate([], "o"), ONE + r"\[\]: must be a list of at least one path"),
    (lambda: API.aggregate(Path("a"), "o"), ONE + r"PosixPath\('a'\) .*: must be a list of paths"),
    (lambda: API.aggregate("a", "o"), ONE + r"'a' .*: must be a list of paths"),
    (
        lambda: API.aggregate([RESULT], "o"),
        ONE + r"a RunResult: must be a path, .*: \.adapter and \.path",
    ),
    (lambda: API.aggregate(["a"], None), r"out = None \(NoneType\): must be a path"),
    (
        lambda: API.aggregate(["a"], "o", weights="1,2"),
        r"weights = '1,2' .*: must be a list of numbers",
    ),
    (lambda: API.aggregate(["a"], "o", weights=["1"]), r"weights = '1' .*: must be a number"),
    (
        lambda: API.aggregate(["a"], "o", max_rank=2.5),
        r"max_rank = 2\.5 .*: must be a whole number",
    ),
    (
        lambda: API.aggregate(["a"], "o", reduce_intruders="x"),
        r"reduce_intruders = 'x' .*: must be a number",
    ),
    (lambda: API.aggregate(["a"], "o", strategy=None), r"strategy = None .*: must be a name"),
    (
        lambda: API.aggregate(["a"], "o", options=["a=1"]),
        r"options = \['a=1'\] .*: must be a mapping",
    ),
    (lambda: API.load(RESULT), r"fedlora\.load: adapter = a RunResult: must be a path"),
    (lambda: API.load_run(None), r"fedlora\.load_run: path = None"),
    (lambda: API.load_study(5), r"fedlora\.load_study: path = 5 \(int\)"),
    (lambda: API.evaluate("a", FRAME), r"data = a DataFrame: .* fedlora\.data\.from_dataframe"),
    (lambda: API.evaluate("a", None), r"fedlora\.evaluate: data = None"),
    (
        lambda: API.compare({}, "o", share="nowhere"),
        r"share = 'nowhere' .*: must be a list of paths",
    ),
    (lambda: API.compare({}, "o", parallel=1.5), r"parallel = 1\.5 .*: must be a whole number"),
    (lambda: API.run(["a=1"], "o"), r"fedlora\.run: config = \['a=1'\] .*: must be a TOML file"),
    (lambda: API.run(FRAME, "o"), r"config = a DataFrame: must be a TOML file"),
    (lambda: API.run(overrides=["a=1"]), r"fedlora\.run: overrides = .* must be a mapping of keys"),
    (lambda: API.run({1: 2}, "o"), r"a key = 1 \(int\): must be a string"),
    (lambda: API.run(out="o", data={"name": FRAME}), r"data\.name = a DataFrame: .*data\.from_dataframe"),
    (lambda: API.run(out="o", data={"name": Dataset.from_pandas(FRAME)}), r"data\.from_datasets"),
    (lambda: API.run({"data.name": FRAME}, "o"), r"data\.name = a DataFrame: .*data\.from_dataframe"),
    (lambda: API.run({}, 5), r"fedlora\.run: out = 5 \(int\)"),
    (lambda: API.run({}, "o", callback=5), r"callback = 5 \(int\): must be a function"),
]
"""Calls with what people pass, and the line that each is."""


@pytest.mark.parametrize("call", WRONG, ids=lambda call: call[1])
def test_an_argument_of_another_kind_is_one_line(
    call: tuple[Callable[[], Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fedlora.ConfigError, match=call[1]) as told:
        call[0]()
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 200
    assert not list(tmp_path.iterdir())


def test_a_path_may_be_a_path_wherever_it_may_be_a_string(tmp_path: Path) -> None:
    gone = tmp_path / "gone.csv"
    for data in (gone, str(gone)):
        with pytest.raises(fedlora.ConfigError, match=r"gone\.csv': no such file"):
            fedlora.run(out=tmp_path / "o", data={"name": data}, model="tiny", engine="in-process")


# --- studies -----------------------------------------------------------------------------------------


@pytest.fixture
def a_study(tmp_path: Path) -> fedlora.StudyResult:
    """A study as `compare` leaves it, of made-up runs."""
    import tomli_w

    from fedlora.config import to_flat, unflatten

    runs = study()
    for run in runs:
        home = tmp_path / run.label
        home.mkdir()
        (home / "config.toml").write_text(tomli_w.dumps(unflatten(to_flat(run.config))))
        (home / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run.rounds))
        (home / "result.json").write_text(json.dumps(run.result))
        (home / "provenance.json").write_text(json.dumps(run.provenance))
    write_tables(tmp_path, runs, ())
    (tmp_path / "study.json").write_text("{}")
    return fedlora.load_study(tmp_path)


@pytest.mark.parametrize(("ending", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_a_chart_of_the_report_is_a_figure_for_a_paper(
    ending: str, begins: bytes, a_study: fedlora.StudyResult, tmp_path: Path
) -> None:
    figure = a_study.figure("accuracy")
    figure.savefig(tmp_path / f"accuracy.{ending}")
    assert (tmp_path / f"accuracy.{ending}").read_bytes().startswith(begins)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "fedavg", "ffa", "flora", "lora-fair", "fedsvd", "head-only", "centralised", "local-only",
        "fedavg-private", "ffa-private", "head-only-private",
    ]  # fmt: skip
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_chart_that_is_not_there_is_refused(a_study: fedlora.StudyResult, tmp_path: Path) -> None:
    with pytest.raises(fedlora.ConfigError, match=r"figure = 'acuracy' \(did you mean accuracy\?\)"):
        a_study.figure("acuracy")
    (tmp_path / "results.parquet").unlink()
    with pytest.raises(fedlora.ConfigError, match="no results yet"):
        a_study.figure("accuracy")


# --- examples in memory ------------------------------------------------------------------------------

DAYS = {"review": [f"day {i} was fine" for i in range(60)], "stars": ["good", "bad"] * 30}


def _read(name: str, **keys: Any) -> Any:
    return load_examples(DataConfig(name=name, partitioner="iid", num_partitions=2, **keys))


def test_a_frame_is_the_data_of_a_run_as_its_file_would_be(tmp_path: Path, cache: Path) -> None:
    frame = pandas.DataFrame(DAYS)
    frame.to_csv(tmp_path / "days.csv", index=False)
    columns = {"text_column": "review", "label_column": "stars"}
    kept = fedlora.data.from_dataframe(frame.astype({"stars": "category"}).iloc[::-1].iloc[::-1])
    assert kept == fedlora.data.from_dataframe(frame)
    assert Path(kept).is_relative_to(cache)
    mine, file = _read(kept, **columns), _read(str(tmp_path / "days.csv"), **columns)
    assert mine.train.to_list() == file.train.to_list()
    assert (mine.test.to_list(), mine.label_names) == (file.test.to_list(), ("bad", "good"))
    with pytest.raises(fedlora.ConfigError, match=r"no such column in .*, it has review, stars"):
        _read(kept)


def test_a_dataset_keeps_the_names_of_its_classes_and_its_test_split(cache: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    whole = Dataset.from_dict({"text": DAYS["review"], "label": [0, 1] * 30}, features=features)
    assert _read(fedlora.data.from_datasets(whole)).label_names == ("no", "yes")
    both = DatasetDict({"train": whole.select(range(40)), "test": whole.select(range(40, 60))})
    assert [len(part) for part in _both(_read(fedlora.data.from_datasets(both)))] == [40, 20]


def _both(found: Any) -> tuple[Any, Any]:
    return found.train, found.test


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1], "from_dataframe: list is no pandas DataFrame"),
        (pandas.DataFrame(DAYS)[:0], "from_dataframe: there is no row in it"),
        (pandas.DataFrame({"text": ["a", 1]}), "from_dataframe: .*Conversion failed for column text"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "from_dataframe: Duplicate column names"),
        (Dataset.from_dict({"text": []}), "from_datasets: there is no row in it"),
        (Dataset.from_dict(DAYS).to_iterable_dataset(), "from_datasets: IterableDataset is neither"),
        (DatasetDict({"trian": Dataset.from_dict(DAYS)}), r"split = 'trian' \(did you mean train\?\)"),
        (DatasetDict({"test": Dataset.from_dict(DAYS)}), "there is no train split, it has test"),
    ],
)
def test_other_things_in_memory_are_refused_in_one_line(given: Any, said: str, cache: Path) -> None:
    make = (
        fedlora.data.from_datasets if "datasets" in said or "split" in said else fedlora.data.from_dataframe
    )
    with pytest.raises(fedlora.ConfigError, match=said) as refused:
        make(given)
    assert "\n" not in str(refused.value)
    assert not list(cache.glob("frames/.new-*"))
