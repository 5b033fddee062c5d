"""Cells that are kept in the repository and go on where they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.publish import FILES, main, pack, read, unpack


def cell(study: Path, label: str, finished: bool = True, result: str = '{"accuracy": 0.5}\n') -> None:
    home = study / label
    (home / "adapter").mkdir(parents=True)
    for name in FILES:
        if finished or name != "result.json":
            (home / name).write_text(result if name == "result.json" else f"{label} {name}\n")


def test_there_and_back(tmp_path: Path) -> None:
    study, kept, again = tmp_path / "study", tmp_path / "kept", tmp_path / "again"
    cell(study, "a-seed-1")
    cell(study, "b-seed-1", finished=False)
    assert pack(study, kept) == 1
    cell(study, "c-seed-1")
    assert pack(study, kept) == 2
    assert sorted(read(kept)) == ["a-seed-1", "c-seed-1"]
    assert unpack(kept, again) == 2
    assert unpack(kept, again) == 0
    for label in ("a-seed-1", "c-seed-1"):
        for name in FILES:
            assert (again / label / name).read_bytes() == (study / label / name).read_bytes()
        assert not (again / label / "adapter").exists()


def test_another_result_of_the_same_cell_is_refused(tmp_path: Path) -> None:
    cell(tmp_path / "one", "a")
    cell(tmp_path / "two", "a", result='{"accuracy": 0.6}\n')
    main(["pack", str(tmp_path / "one"), str(tmp_path / "kept")])
    before = (tmp_path / "kept" / "cells.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="a: another result stands in"):
        main(["pack", str(tmp_path / "two"), str(tmp_path / "kept")])
    assert (tmp_path / "kept" / "cells.jsonl").read_bytes() == before
