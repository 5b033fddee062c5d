"""Where the result goes: an adapter may take the place of an adapter, of nothing else, and never half."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import fedlora.models.export
from tests.aggregate.saved import aggregate, refused


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_an_adapter_is_replaced_by_another(alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    shutil.copytree(alike["llama"][2], tmp_path / "out")
    before = contents(tmp_path / "out")
    request = ["--strategy", "fedavg", "--out", tmp_path / "out", *alike["llama"][:2]]
    assert aggregate(*request).exit_code == 0
    assert contents(tmp_path / "out").keys() == before.keys() - {"README.md"}
    assert contents(tmp_path / "out") != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("file", ["optimizer.pt", "notes/today.txt"])
@pytest.mark.parametrize("adapter", [True, False])
def test_a_directory_with_anything_else_is_left_alone(
    file: str, adapter: bool, alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if adapter:
        shutil.copytree(alike["llama"][2], out)
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    (out / file).write_text("precious")
    before = contents(out)
    refused(aggregate("--strategy", "fedavg", "--out", out, *alike["llama"][:2]), "is not empty", file[:5])
    assert contents(out) == before


def test_a_merged_model_replaces_nothing(alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    shutil.copytree(alike["llama"][2], tmp_path / "out")
    request = ["--strategy", "fedavg", "--out", tmp_path / "out", "--merge", *alike["llama"][:2]]
    refused(aggregate(*request), "is not empty")
    assert contents(tmp_path / "out") == contents(alike["llama"][2])


def test_what_is_read_is_not_replaced(
    bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    out, inner = tmp_path / "out", tmp_path / "out" / "inner"
    for target in (out, inner):
        shutil.copytree(alike["llama"][0], target)
    before = contents(out)
    for source in (out, inner):
        request = ["--strategy", "fedavg", "--out", out, source, alike["llama"][1]]
        refused(aggregate(*request), f"{source} is read from there")
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(bases["llama"], empty / "base")
    request = ["--strategy", "fedavg", "--out", empty, "--base", empty / "base", *alike["llama"][:2]]
    refused(aggregate(*request), "base is read from there")
    assert contents(out) == before


def test_a_file_or_an_impossible_path_is_refused(alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(aggregate("--strategy", "fedavg", "--out", out, *alike["llama"][:2]), str(out))
    assert contents(tmp_path) == {"file": b"precious"}


def test_a_write_that_fails_leaves_what_was_there(
    alike: Mapping[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(alike["llama"][2], out)
    before = contents(out)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fedlora.models.export, "save_file", full)
    result = aggregate("--strategy", "fedavg", "--out", out, *alike["llama"][:2])
    assert result.exit_code == 1
    assert result.stderr.strip() == f"error: {out}: No space left on device; what was written before is kept"
    assert contents(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_brackets_in_a_name_are_printed_as_they_are(alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    odd = tmp_path / "a[bold]b[" / "x]"
    shutil.copytree(alike["llama"][0], odd)
    assert str(odd) in aggregate("--strategy", "fedavg", "--out", tmp_path / "out", odd).stdout
    missing = tmp_path / "c[" / "d]"
    refused(aggregate("--strategy", "fedavg", "--out", tmp_path / "no", missing), f"{missing}: no such")


def test_a_home_directory_in_quotes_is_the_home_directory(
    alike: Mapping[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    aggregate("--strategy", "fedavg", "--out", "~/out", *alike["llama"][:2])
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert not (tmp_path / "~").exists()
