"""``save-total-limit``: how many checkpoints stay, and that each of them can be gone on from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fedlora.errors import ConfigError
from tests.conftest import tiny_config
from tests.federation.test_kinds import run, values


def names(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "run" / "checkpoint").iterdir())


def test_one_checkpoint_is_kept_unless_more_are_wanted(tmp_path: Path, cache: Path) -> None:
    run(tmp_path / "one")
    assert names(tmp_path / "one") == ["latest.json", "state-00003.safetensors"]
    run(tmp_path / "two", **{"save-total-limit": 2})
    kept = [
        f"{kind}-0000{n}.{end}" for kind, end in (("round", "json"), ("state", "safetensors")) for n in (2, 3)
    ]
    assert names(tmp_path / "two") == ["latest.json", *kept]


@pytest.mark.parametrize(
    ("strategy", "upload"), [("fedavg", ""), ("flora", ""), ("fedsa", ""), ("fedavg", "topk")]
)
def test_an_earlier_round_is_gone_on_from_with_the_same_bits(
    strategy: str, upload: str, tmp_path: Path, cache: Path
) -> None:
    keys = {"strategy.name": strategy, "save-total-limit": 3, "upload": upload}
    whole = run(tmp_path, **keys)
    before, folder = values(whole), tmp_path / "run" / "checkpoint"
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    shutil.copy(folder / "round-00001.json", folder / "latest.json")
    again = run(tmp_path, resume=True, **keys)
    assert again.state.round == 3
    for name, tensor in values(again).items():
        assert torch.equal(tensor, before[name]), name
    assert [patch.digest() for patch in again.state.base] == [patch.digest() for patch in whole.state.base]
    assert len((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()) == len(lines)
    fewer = run(tmp_path, resume=True, **{**keys, "save-total-limit": 1, "num-server-rounds": 4})
    assert fewer.state.round == 4
    assert [name for name in names(tmp_path) if not name.startswith("patch")] == [
        "latest.json", "state-00004.safetensors",
    ]  # fmt: skip


def test_no_checkpoint_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^save-total-limit = 0: must be > 0"):
        tiny_config(**{"save-total-limit": 0})
