"""What lies on disk between rounds is what was written: damage is named, or mended from what is redundant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.store import KEEP_NAMED, OWN, ClientStore
from fedlora.config import RunConfig, from_flat
from fedlora.core.base_patches import digest
from fedlora.core.sealed import read_sealed, sealed, unsealed_counted
from fedlora.core.state import ServerState, State
from fedlora.errors import ConfigError, UpdateRefused
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.results import read_result
from fedlora.simulation.in_process import InProcessEngine

KEYS: dict[str, Any] = {
    "model.name": "tiny", "data.name": "synthetic", "data.evaluate-examples": 8, "lora.rank": 2,
    "train.local-steps": 1, "train.batch-size": 2, "engine.name": "in-process", "num-server-rounds": 3,
}  # fmt: skip


def carry_out(path: Path, *, resume: bool = False, **keys: Any) -> bytes:
    """A run; returns its adapter."""
    config: RunConfig = from_flat({**KEYS, **{k.replace("_", "-"): v for k, v in keys.items()}})
    run = FederatedRun(ENGINE.session(config, path), RunDirectory(path, resume=resume))
    run.run()
    return (path / "adapter" / "adapter_model.safetensors").read_bytes()


ENGINE = InProcessEngine()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    carry_out(path, **{"strategy.name": "flora"})
    return path


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run that can go on."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    return path


def flipped(file: Path, place: float) -> None:
    """One bit of a file at a share of its length."""
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)


def go_on(path: Path) -> bytes:
    return carry_out(path, resume=True, num_server_rounds=4, **{"strategy.name": "flora"})


@pytest.mark.parametrize("place", [0.0, 0.03, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("name", ["latest.json", "state-00003.safetensors", "rounds.jsonl"])
def test_a_flipped_bit_is_refused_with_the_files_name(stopped: Path, name: str, place: float) -> None:
    file = stopped / name if name == "rounds.jsonl" else stopped / "checkpoint" / name
    flipped(file, place)
    with pytest.raises(ConfigError, match=name) as caught:
        go_on(stopped)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "config.toml", "provenance.json", "rounds.jsonl", "checkpoint/latest.json",
        "checkpoint/state-00003.safetensors",
    ],
)  # fmt: skip
def test_a_missing_file_is_refused_by_name(stopped: Path, name: str) -> None:
    (stopped / name).unlink()
    with pytest.raises(ConfigError, match=Path(name).name) as caught:
        go_on(stopped)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["before.json", "samples.json"])
def test_what_was_measured_before_round_1_is_not_measured_again_after_it(name: str, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.write_before({"loss": 1.0})
    directory.write_samples("before", [])
    directory.save_checkpoint(ServerState(State(round=1, adapters={}, head={})))
    assert directory.load_checkpoint() is not None
    (tmp_path / "run" / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}: is missing, which was made before round 1"):
        directory.load_checkpoint()


def test_samples_that_a_result_was_written_beside_are_not_lost_in_silence(stopped: Path) -> None:
    directory = RunDirectory(stopped, resume=True)
    directory.write_samples("after", [{"prompt": "a", "text": "b"}])
    directory.write_result({"accuracy": 0.5})
    assert read_result(stopped) == {"accuracy": 0.5}
    (stopped / "samples.json").unlink()
    with pytest.raises(ConfigError, match=r"samples.json: is not what result.json was made of"):
        read_result(stopped)


def test_a_line_that_is_gone_from_the_middle_is_refused_and_a_half_one_at_the_end_is_not(
    stopped: Path,
) -> None:
    file = stopped / "rounds.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines) + '{"round": 4, "acc')
    go_on(stopped)
    file.write_text("".join([lines[0], "rubbish\n", *lines[2:]]))
    with pytest.raises(ConfigError, match=r"rounds.jsonl: is damaged, line 2 is no JSON"):
        RunDirectory(stopped, resume=True).load_checkpoint()


@pytest.mark.parametrize("damage", ["", "  \n", "other\n", None])
def test_the_runs_key_comes_from_the_checkpoint(stopped: Path, damage: str | None) -> None:
    file = stopped / "run-key.txt"
    key = file.read_text()
    if damage is None:
        file.unlink()
    else:
        file.write_text(damage)
    directory = RunDirectory(stopped, resume=True)
    assert directory.run_key() == key.strip()
    assert file.read_text() == key


def test_an_empty_key_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    (tmp_path / "run" / "run-key.txt").write_text("")
    with pytest.raises(ConfigError, match=r"run-key.txt: is damaged"):
        directory.run_key()


@pytest.mark.parametrize("place", [0.001, 0.5, 0.99])
def test_a_damaged_patch_comes_back_from_what_the_clients_keep(
    stopped: Path, place: float, caplog: pytest.LogCaptureFixture
) -> None:
    patch = stopped / "checkpoint" / f"patch-{_patch_digest(stopped, 2)[:16]}.safetensors"
    whole = patch.read_bytes()
    expected = go_on(_copy(stopped))
    flipped(patch, place)
    assert go_on(stopped) == expected
    assert len(patch.read_bytes()) == len(whole)
    flipped(patch, place)
    (spare,) = (stopped / "clients").rglob(f"{_patch_digest(stopped, 2)}.safetensors")
    flipped(spare, 0.9)
    with pytest.raises(ConfigError, match=spare.name):
        go_on(stopped)
    spare.unlink()
    with pytest.raises(ConfigError, match=rf"{patch.name}: is damaged"):
        go_on(stopped)


def _copy(path: Path) -> Path:
    other = path.with_name("other")
    shutil.copytree(path, other)
    return other


def _patch_digest(path: Path, number: int) -> str:
    return str(read_sealed(path / "checkpoint" / "latest.json")["patch-digests"][number - 1])


def test_a_seal_covers_every_entry(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    record = sealed({"round": 3, "by": {"1": [1, 2.5]}})
    for key in ("round", "by"):
        file.write_text(json.dumps({**record, key: 4}))
        with pytest.raises(ConfigError, match=r"a.json: is damaged"):
            read_sealed(file)
    file.write_text(json.dumps(record))
    assert read_sealed(file) == {"round": 3, "by": {"1": [1, 2.5]}}
    del record["sha256"]
    file.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"a.json: has no sha256"):
        read_sealed(file)
    for damaged in (
        json.dumps(sealed(record)).replace("sha256", "sha257"),
        json.dumps({**record, "files_sha256": {"b.json": "0" * 64}}),
    ):
        file.write_text(damaged)
        with pytest.raises(ConfigError, match=r"a.json: has no sha256"):
            read_sealed(file, older=True)


def test_a_record_that_has_lost_its_seal_is_read_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"round": 3}')
    for _ in range(2):
        assert read_sealed(file, older=True) == {"round": 3}
    (said,) = caplog.messages
    assert said.startswith(f"{file}: has no sha256, so that nothing vouches for what it says: an earlier")
    assert "\n" not in said


def test_of_many_records_without_a_seal_the_first_is_named_and_the_others_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [tmp_path / f"{number}.json" for number in range(4)]
    for file in files:
        file.write_text('{"round": 3}')
    with unsealed_counted(), unsealed_counted():
        assert [read_sealed(file, older=True) for file in files] == [{"round": 3}] * 4
    first, others = caplog.messages
    assert first.startswith(f"{files[0]}: has no sha256")
    assert others == "3 other records have no sha256 either"


@pytest.mark.parametrize("place", [0.0, 0.2, 0.6, 0.99])
def test_what_a_client_keeps_to_itself_is_refused_where_it_is_damaged(tmp_path: Path, place: float) -> None:
    store = ClientStore(tmp_path)
    store.keep_personal(3, OWN, 1, {"b": torch.arange(6.0)})
    assert store.personal(3, OWN, 2) is not None
    flipped(tmp_path / "personal" / "3" / "own-000001.safetensors", place)
    with pytest.raises(UpdateRefused, match=r"3/own-000001.safetensors"):
        store.personal(3, OWN, 2)


def test_parts_that_no_round_names_go_and_those_in_use_stay(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    lasting = {"a": torch.zeros(2)}
    store.keep(digest(lasting), lasting)
    for number in range(1, 30):
        part = {"a": torch.full((2,), float(number))}
        store.keep(digest(part), part)
        store.note_named(number, [digest(part), digest(lasting)])
    left = {p.stem for p in (tmp_path / "parts").iterdir()}
    assert digest(lasting) in left
    assert len(left) == 1 + KEEP_NAMED
    assert len(list((tmp_path / "named").iterdir())) == KEEP_NAMED


def test_frozen_factors_of_each_round_leave_no_trail(tmp_path: Path) -> None:
    carry_out(tmp_path / "run", num_server_rounds=KEEP_NAMED + 6, **{"strategy.name": "fedsvd"})
    (parts,) = (tmp_path / "run" / "clients").glob("*/parts")
    assert len(list(parts.iterdir())) <= KEEP_NAMED + 1
