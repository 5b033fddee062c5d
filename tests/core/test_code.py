"""fedlora finds its own packages, whatever the working directory holds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.core.code import BESIDE, code_root, prefer_own_code, top_packages


def test_a_module_of_the_same_name_in_the_working_directory_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in BESIDE:
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in BESIDE:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = [importlib.util.find_spec(name) for name in BESIDE]
    assert [spec.origin for spec in found if spec] == [str(tmp_path / f"{name}.py") for name in BESIDE]
    importlib.invalidate_caches()
    prefer_own_code()
    found = [importlib.util.find_spec(name) for name in BESIDE]
    assert [spec.origin for spec in found if spec] == [str(code_root() / n / "__init__.py") for n in BESIDE]


def test_a_script_beside_a_module_of_the_same_name_is_told_its_path(tmp_path: Path) -> None:
    (tmp_path / "clients.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("import fedlora\nfedlora.RunConfig()\nfedlora.run\n")
    said = subprocess.run([sys.executable, script], capture_output=True, text=True).stderr
    last = f"{tmp_path / 'clients.py'}: hides fedlora's own package 'clients', give it another name"
    assert said.splitlines()[-1] == f"fedlora.errors.ConfigError: {last}"


def test_the_packages_of_a_checkout_lie_side_by_side() -> None:
    assert all((code_root() / name / "__init__.py").is_file() for name in top_packages())
    assert top_packages() == ("clients", "fedlora", "strategies")
