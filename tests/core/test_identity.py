"""What makes two runs the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.config import Scalar, from_flat, to_flat
from fedlora.core.code import top_packages
from fedlora.errors import ConfigError
from fedlora.server import identity
from fedlora.server.directory import RunDirectory
from fedlora.server.identity import (
    APART,
    Identity,
    code_digest,
    config_digest,
    recorded,
    source_digest,
)
from fedlora.server.provenance import PROVENANCE

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("key", "value", "counts"),
    [
        ("lora.rank", 4, True),
        ("seed", 1, True),
        ("evaluate-every", 2, True),
        ("evaluation-precision", "bfloat16", True),
        ("privacy.ledger", "/elsewhere", True),
        ("output-dir", "elsewhere", False),
        ("resume", True, False),
        ("engine.num-actors", 3, False),
        ("engine.address", "192.0.2.1:6379", False),
        ("study.title", "Other", False),
        ("tracking.tool", "mlflow", False),
    ],
)
def test_keys_count_where_they_have_an_effect(key: str, value: Scalar, counts: bool) -> None:
    other = from_flat({key: value})
    assert (config_digest(other) != config_digest(from_flat({}))) is counts


def test_keys_that_came_later_do_not_count_at_their_default() -> None:
    """Else no run of before would be known again."""
    flat = to_flat(from_flat({}))
    assert {key: flat[key] for key in identity.ADDED} == identity.ADDED


def test_no_key_is_forgotten() -> None:
    """Every section whose keys have no effect is one of those that are known."""
    sections = {key.split(".")[0] for key in to_flat(from_flat({})) if key.startswith(identity.NO_EFFECT)}
    assert sections == {"output-dir", "resume", "save-total-limit", "engine", "study", "tracking"}


def package(root: Path) -> Path:
    for name in ("core/a.py", "core/shown/b.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name} = 1\n")
    return root


@pytest.mark.parametrize(
    ("file", "text", "same"),
    [
        ("core/a.py", "changed", False),
        ("core/new.py", "", False),
        ("core/shown/b.py", "changed", True),
        ("core/a.txt", "no code", True),
    ],
)
def test_every_source_file_counts_but_those_apart(file: str, text: str, same: bool, tmp_path: Path) -> None:
    root = package(tmp_path)
    before = source_digest(root, ["core"], ("core/shown/",))
    (root / file).write_text(text)
    assert (source_digest(root, ["core"], ("core/shown/",)) == before) is same


def test_the_files_apart_are_there_and_the_packages_too() -> None:
    for name in (*APART, *top_packages()):
        assert (ROOT / name).exists(), name


def test_a_library_of_another_version_is_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_digest()
    code_digest.cache_clear()
    assert code_digest() == before
    code_digest.cache_clear()
    monkeypatch.setattr(identity, "version_of", lambda name: "99" if name == "opacus" else "1")
    try:
        assert code_digest() != before
    finally:
        code_digest.cache_clear()


# --- in a run's directory ----------------------------------------------------------------------------


def written(path: Path) -> Identity:
    found = recorded(json.loads((path / PROVENANCE).read_text()))
    assert found is not None
    return found


def test_a_run_that_other_code_continues_is_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_flat({})
    for code in ("one", "one", "two", "two"):
        monkeypatch.setattr(identity, "code_digest", lambda code=code: code)
        RunDirectory(tmp_path, resume=True).open(config, "inputs", continues=(tmp_path / PROVENANCE).exists())
    assert written(tmp_path) == Identity(config_digest(config), "one+two", "inputs")


def test_a_run_that_goes_on_with_other_inputs_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    config = from_flat({"data.name": "r.csv"})
    RunDirectory(tmp_path).open(config, "inputs")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"^data.name = 'r.csv', model.name = .*were made with other data"):
        RunDirectory(tmp_path, resume=True).open(config, "other inputs", continues=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_may_go_on_on_another_kind_of_device_and_says_so(tmp_path: Path) -> None:
    """Other data are refused there, too, whichever of the two the run is on then."""
    config, on = from_flat({}), {"cpu": "a", "cuda": "b"}
    RunDirectory(tmp_path).open(config, on["cpu"])
    for device, known in (("cuda", "a+b"), ("cuda", "a+b"), ("cpu", "a+b+a")):
        again = RunDirectory(tmp_path, resume=True)
        again.open(config, on[device], continues=True, elsewhere=on.values())
        assert written(tmp_path).inputs == known
    with pytest.raises(ConfigError, match="other data"):
        RunDirectory(tmp_path, resume=True).open(config, "c", continues=True, elsewhere=["c", "d"])


def test_inputs_that_are_not_known_on_either_side_are_not_refused(tmp_path: Path) -> None:
    for inputs in ("inputs", None, "others"):
        continues = (tmp_path / PROVENANCE).exists()
        RunDirectory(tmp_path, resume=True).open(from_flat({}), inputs, continues=continues)
    assert written(tmp_path).inputs is None


def test_what_was_measured_before_round_1_of_other_inputs_is_measured_again(tmp_path: Path) -> None:
    for inputs, kept in (("inputs", False), ("inputs", True), ("others", False)):
        directory = RunDirectory(tmp_path, resume=True)
        directory.open(from_flat({}), inputs)
        assert (directory.before() is not None) is kept
        directory.write_before({"loss": 1.0})


def test_a_run_that_begins_anew_is_of_todays_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in ("one", "two"):
        monkeypatch.setattr(identity, "code_digest", lambda code=code: code)
        RunDirectory(tmp_path, resume=True).open(from_flat({}), "inputs")
    assert written(tmp_path).code == "two"


def test_rounds_of_which_nothing_is_recorded_stay_unknown(tmp_path: Path) -> None:
    RunDirectory(tmp_path).open(from_flat({}), "inputs")
    (tmp_path / PROVENANCE).write_text("{}")
    RunDirectory(tmp_path, resume=True).open(from_flat({}), "inputs", continues=True)
    assert written(tmp_path).code == f"not recorded+{code_digest()}"
    assert written(tmp_path).inputs is None
