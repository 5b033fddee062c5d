"""A spoiled file is refused in one line that names it, or read as what it was; none is ever unpickled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from clients.node_settings import read_node
from clients.store import OWN, ClientStore
from fedlora.config import from_flat
from fedlora.core.sealed import read_sealed
from fedlora.deployment.operator.layout import roll_of
from fedlora.errors import ConfigError, UpdateRefused
from tests.fuzz.harness import fuzz
from tests.fuzz.subjects import SUBJECTS

COUNT = 100
"""Of each subject; `python -m tests.fuzz` makes as many as it is told."""


@pytest.mark.parametrize("name", SUBJECTS)
def test_spoiled_files_are_refused_by_name_or_do_no_harm(name: str, tmp_path: Path, cache: Path) -> None:
    outcomes = fuzz(name, SUBJECTS[name], COUNT, tmp_path)
    assert sum(outcomes.values()) == COUNT
    assert outcomes["refused"] > COUNT // 10, outcomes


def test_a_file_whose_digest_has_lost_its_name_is_none_of_before_there_were_digests(tmp_path: Path) -> None:
    """Older files have no metadata; found by seed 31 of a client's parts, mutation 7033."""
    store = ClientStore(tmp_path)
    store.keep_personal(0, OWN, 1, {"b": torch.arange(3.0)})
    (file,) = (tmp_path / "personal" / "0").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"digest"', b'"difest"')[:-1] + b"\x41")
    with pytest.raises(UpdateRefused, match=r"own-000001\.safetensors: what this client keeps .* is damaged"):
        store.personal(0, OWN, 2)
    file.write_bytes(save({"b": torch.ones(3)}))
    found = store.personal(0, OWN, 2)
    assert found is not None
    assert found["b"].tolist() == [1, 1, 1]


def test_a_seal_that_is_null_is_no_record_of_before_there_were_seals(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text('{"before": [], "sha256": null}')
    with pytest.raises(ConfigError, match=r"samples\.json: is damaged"):
        read_sealed(tmp_path / "samples.json", older=True)


@pytest.mark.parametrize("vouched", ['"all"', "null", '{"a.json": 3}', '["a.json"]'])
def test_a_record_vouches_for_files_by_hashes_alone(vouched: str, tmp_path: Path) -> None:
    (tmp_path / "fedlora.json").write_text(f'{{"files_sha256": {vouched}}}')
    with pytest.raises(ConfigError, match=r"fedlora\.json: is damaged, files_sha256 holds something else"):
        read_sealed(tmp_path / "fedlora.json", older=True)


def test_what_stands_in_a_file_does_not_break_its_line(tmp_path: Path) -> None:
    file = tmp_path / "federation.toml"
    file.write_text('host = "h"\nport = 1\ncontrol-port = 2\nnodes = ["two\\nlines"]\n')
    with pytest.raises(ConfigError) as refused:
        roll_of(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("entry", ["[max-epsilon]\na = 1", "max-epsilon = [1]", "allow = 1979-05-27"])
def test_a_table_in_a_node_s_settings_is_refused_by_its_key(entry: str, tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(f"partition-id = 1\n{entry}\n")
    with pytest.raises(ConfigError, match=r"node\.toml: (max-epsilon|allow) = .*must be a boolean, number"):
        read_node(tmp_path)


def test_a_nul_in_a_configuration_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^model\.chat-template = .*holds a NUL"):
        from_flat({"model.chat-template": "a\0b"})
