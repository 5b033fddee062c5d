"""What a client keeps on disk between messages: parts by digest, its own tensors by round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clients import holdings
from clients.holdings import Holdings
from fedlora.updates import digest

PART = {"layer.left": torch.arange(6.0).reshape(2, 3), "layer.right": torch.ones(3, 2)}


def test_a_part_is_found_by_another_process_under_its_digest(tmp_path: Path) -> None:
    Holdings(tmp_path).keep(digest(PART), PART)
    found = Holdings(tmp_path).get(digest(PART))
    assert found is not None
    assert all(torch.equal(found[name], PART[name]) for name in PART)
    assert Holdings(tmp_path / "other").get(digest(PART)) is None


def test_a_part_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not have the content"):
        Holdings(tmp_path).keep(digest(PART), {**PART, "layer.right": torch.zeros(3, 2)})
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""]
)
def test_a_damaged_part_counts_as_missing(damage: object, tmp_path: Path) -> None:
    Holdings(tmp_path).keep(digest(PART), PART)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert Holdings(tmp_path).get(digest(PART)) is None


def test_a_part_is_read_once_as_long_as_its_file_is_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message has a store of its own; a base that has moved a hundred times has a hundred parts."""
    name = digest(PART)
    Holdings(tmp_path).keep(name, PART)
    assert Holdings(tmp_path).has(name)
    with monkeypatch.context() as patched:
        patched.setattr(holdings, "_read", lambda _: pytest.fail("was read again"))
        assert Holdings(tmp_path).has(name)
    (file,) = (tmp_path / "parts").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert not Holdings(tmp_path).has(name)
    file.unlink()
    assert not Holdings(tmp_path).has(name)


def test_a_round_that_is_run_again_starts_from_the_same_own_tensors(tmp_path: Path) -> None:
    holdings = Holdings(tmp_path)
    for server_round in (1, 2, 5):
        holdings.keep_personal(3, "own", server_round, {"w": torch.tensor([float(server_round)])})
    for before, expected in ((6, 5.0), (5, 2.0), (3, 2.0)):
        own = holdings.personal(3, "own", before)
        assert own is not None
        assert own["w"].item() == expected
    assert holdings.personal(3, "own", 1) is None
    assert holdings.personal(4, "own", 9) is None
