"""The built wheel, installed into an environment of its own, runs outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"fedlora", "strategies", "clients"}
    for package in tops:
        built = {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")}
        kept = {str(p.relative_to(ROOT)) for p in (ROOT / package).rglob("*.py")}
        assert built == kept


@pytest.mark.slow
def test_the_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path, cache: Path) -> None:
    """The environment starts empty; its dependencies are this one's, so that nothing is downloaded."""
    home = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    ours = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(site) / "dependencies.pth").write_text(f"{ours}\n")
    config = tmp_path / "tiny.toml"
    config.write_text((ROOT / "experiments" / "tiny.toml").read_text())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.run(
        [str(python), "-c", "import fedlora, strategies; print(fedlora.__file__, strategies.__file__)"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(ROOT) not in where.replace(str(home), "")
    subprocess.run(
        [str(home / "bin" / "fedlora"), "run", str(config), "--out", str(tmp_path / "out")],
        cwd=tmp_path, env=environment, check=True, timeout=300,
    )  # fmt: skip
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
