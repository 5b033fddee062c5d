"""A spoiled file is refused in one line that names it, or read as what it was; none is ever unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from clients.node_settings import read_node
from clients.store import OWN, ClientStore
from fedlora.config import from_flat
from fedlora.core.sealed import read_sealed, sealed
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


@pytest.mark.parametrize("lost", ["its name", "its metadata", "what is in its metadata"])
def test_what_a_client_keeps_is_not_gone_on_with_without_its_digest(lost: str, tmp_path: Path) -> None:
    """The name: found by seed 31 of a client's parts, mutation 7033."""
    store = ClientStore(tmp_path)
    store.keep_personal(0, OWN, 1, {"b": torch.arange(3.0)})
    (file,) = (tmp_path / "personal" / "0").iterdir()
    whole = file.read_bytes()
    changed = {
        "its name": whole.replace(b'"digest"', b'"difest"'),
        "its metadata": save({"b": torch.arange(3.0)}),
        "what is in its metadata": save({"b": torch.arange(3.0)}, {}),
    }
    file.write_bytes(changed[lost])
    with pytest.raises(UpdateRefused, match=r"own-000001\.safetensors: what this client keeps .* is damaged"):
        store.personal(0, OWN, 2)


def test_a_seal_that_is_null_is_no_record_of_before_there_were_seals(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text('{"before": [], "sha256": null}')
    with pytest.raises(ConfigError, match=r"samples\.json: is damaged"):
        read_sealed(tmp_path / "samples.json", older=True)


@pytest.mark.parametrize("vouched", ["all", None, {"a.json": 3}, ["a.json"]])
def test_a_record_vouches_for_files_by_hashes_alone(vouched: Any, tmp_path: Path) -> None:
    """Whoever sealed it: adapters come from strangers."""
    (tmp_path / "fedlora.json").write_text(json.dumps(sealed({"files_sha256": vouched})))
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
