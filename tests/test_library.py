"""The public API: the names are there, and do what the commands do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora

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
    few = {"num-server-rounds": 1, "engine.name": "in-process"}
    result = fedlora.run(str(TINY), tmp_path / "run", overrides={**few, "seed": 3})
    assert result.config.seed == 3
    assert result.record == json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result.rounds) == 1
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert fedlora.load_run(tmp_path / "run").record == result.record


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
