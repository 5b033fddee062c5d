"""What would be published on Flower Hub passes Flower's own checks, and `flwr new` makes the app of it."""

from __future__ import annotations

import io
import zipfile
from importlib import import_module
from pathlib import Path

import click
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate

from experiments.hub import ROOT, bundle

publish, new = (import_module(f"flwr.cli.{name}") for name in ("app_cmd.publish", "new.new"))
"""Their packages hold functions of the same names."""


def as_published(app: Path) -> dict[str, Path]:
    """Flower's checks before an upload; the files that it would send."""
    config, warnings = load_and_validate(app / "pyproject.toml", check_module=False)
    assert warnings == []
    publish._validate_app_name(app.name, "directory")
    publish._validate_description(config["project"]["description"])
    files = publish._collect_file_paths(app)
    publish._validate_files(files)
    return {path.relative_to(app.resolve()).as_posix(): path for path in files}


def test_flwr_new_makes_the_same_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = as_published(bundle(tmp_path / "fedlora"))
    assert {"pyproject.toml", "README.md", "LICENSE", "strategies/rules/flora.py"} <= sent.keys()
    assert not any(name.startswith(("tests/", "experiments/", "docs/")) for name in sent)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, path in sent.items():
            archive.write(path, f"fedlora/{name}")
    packed.seek(0)
    monkeypatch.setattr(new, "request_download_link", lambda *_: ("nowhere", None, None))
    monkeypatch.setattr(new, "_download_zip_to_memory", lambda _: packed)
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "user")
    new.new("@somebody/fedlora")
    assert build_fab_from_disk(tmp_path / "user" / "fedlora") == build_fab_from_disk(ROOT)


def test_the_repository_itself_is_refused_and_a_directory_in_use_left_alone(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="too large"):
        publish._validate_files(list((ROOT / "experiments" / "published").rglob("cells.jsonl")))
    with pytest.raises(SystemExit, match="is there already"):
        bundle(tmp_path)
