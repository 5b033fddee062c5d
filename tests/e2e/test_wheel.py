"""The built wheel runs outside the checkout and takes no name but its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedlora.core.code import EXAMPLES

ROOT = Path(__file__).parents[2]
IMPORTED = re.compile(r"(?m)^\s*(from|import) (clients|strategies)\b")
SCRIPT = """
from pathlib import Path

import clients
import strategies
from fedlora.clients import base_mod
from fedlora.strategies import FLoRA

assert (clients.MINE, strategies.MINE) == (1, 2)
assert FLoRA(fraction_train=0.5, scaling=2.0).rule.facts.exact
assert callable(base_mod)
print(Path(clients.__file__).parent.name)
"""
TYPED = """
from fedlora.strategies import FLoRA
import fedlora

reveal_type(fedlora.RunConfig().lora.rank)
reveal_type(FLoRA(fraction_train=0.5, scaling=2.0).rule.facts.exact)
reveal_type(fedlora.load("adapter").predict(["a text"])[0].label)
"""
HEAVY = """
[mypy]
follow_imports = silent
ignore_missing_imports = true
[mypy-flwr.*,torch.*,transformers.*,numpy.*,scipy.*,ray.*,datasets.*]
follow_imports = skip
"""
"""Libraries that are left out: reading them takes a minute and tells nothing of fedlora's types."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; its dependencies are this one's, so that nothing is downloaded."""
    home = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = next(home.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    ours = [entry for entry in sys.path if entry.endswith("site-packages")]
    (site / "dependencies.pth").write_text("".join(f"{entry}\n" for entry in ours))
    return home / "bin" / "python"


def outside(python: Path, *command: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project that has packages ``clients`` and ``strategies`` of its own."""
    for name, number in (("clients", 1), ("strategies", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"MINE = {number}\n")
    return tmp_path


@pytest.mark.slow
def test_the_wheel_holds_one_package_with_all_modules(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name]
    stand_ins = {"fedlora/clients.py", "fedlora/strategies.py"}
    kept = {str(p.relative_to(ROOT)) for p in (ROOT / "fedlora").rglob("*.py")} - stand_ins
    for package in ("clients", "strategies"):
        kept |= {f"fedlora/{p.relative_to(ROOT)}" for p in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == kept
    others = ("py.typed", "pyproject.toml", "LICENSE", "deployment/operator/templates/start.sh")
    assert {f"fedlora/{name}" for name in others} <= set(names)


@pytest.mark.slow
def test_no_module_of_the_wheel_imports_the_names_that_it_leaves_to_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                assert not IMPORTED.search(archive.read(name).decode()), name


@pytest.mark.slow
def test_it_lives_beside_packages_of_the_same_names(python: Path, project: Path, cache: Path) -> None:
    (project / "mine.py").write_text(SCRIPT)
    assert outside(python, "mine.py", cwd=project).strip() == "clients"
    (project / "tiny.toml").write_text((ROOT / "experiments" / "tiny.toml").read_text())
    command = "from fedlora.cli import main; main()"
    outside(python, "-c", command, "run", "tiny.toml", "--out", "out", cwd=project)
    assert (project / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_its_help_shows_examples_that_it_has(python: Path, tmp_path: Path) -> None:
    command = "from fedlora.cli import main; main()"
    for name in EXAMPLES:
        printed = outside(python, "-c", command, "example", name, cwd=tmp_path)
        assert printed == (ROOT / "experiments" / f"{name}.toml").read_text()
    assert "experiments/" not in "".join(
        outside(python, "-c", command, *words, "--help", cwd=tmp_path)
        for words in (["run"], ["compare"], ["probe"], ["privacy", "audit"])
    )


@pytest.mark.slow
def test_it_is_typed(python: Path, tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(TYPED)
    (tmp_path / "mypy.ini").write_text(HEAVY)
    told = outside(python, "-m", "mypy", "--strict", "typed.py", cwd=tmp_path)
    assert told.count('Revealed type is "int"') == 1, told
    assert told.count('Revealed type is "bool"') == 1, told
    assert told.count('Revealed type is "str"') == 1, told
