"""What a client keeps on disk between messages: parts by digest, its own tensors by round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clients import store
from clients.store import ClientStore
from fedlora.core.base_patches import digest

PART = {"layer.left": torch.arange(6.0).reshape(2, 3), "layer.right": torch.ones(3, 2)}


def test_a_part_is_found_by_another_process_under_its_digest(tmp_path: Path) -> None:
    ClientStore(tmp_path).keep(digest(PART), PART)
    found = ClientStore(tmp_path).get(digest(PART))
    assert found is not None
    assert all(torch.equal(found[name], PART[name]) for name in PART)
    assert ClientStore(tmp_path / "other").get(digest(PART)) is None


def test_a_part_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not have the content"):
        ClientStore(tmp_path).keep(digest(PART), {**PART, "layer.right": torch.zeros(3, 2)})
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""]
)
def test_a_damaged_part_counts_as_missing(damage: object, tmp_path: Path) -> None:
    ClientStore(tmp_path).keep(digest(PART), PART)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert ClientStore(tmp_path).get(digest(PART)) is None


def test_a_part_is_read_once_as_long_as_its_file_is_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message has a store of its own; a base that has moved a hundred times has a hundred parts."""
    name, whole = digest(PART), dict[Path, tuple[int, int]]()
    ClientStore(tmp_path).keep(name, PART)
    assert ClientStore(tmp_path, whole).has(name)
    with monkeypatch.context() as patched:
        patched.setattr(store, "_tensors", lambda _: pytest.fail("was read again"))
        assert ClientStore(tmp_path, whole).has(name)
    (file,) = (tmp_path / "parts").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert not ClientStore(tmp_path, whole).has(name)
    file.unlink()
    assert not ClientStore(tmp_path, whole).has(name)


def test_a_round_that_is_run_again_starts_from_the_same_own_tensors(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for server_round in (1, 2, 5):
        store.keep_personal(3, "own", server_round, {"w": torch.tensor([float(server_round)])})
    for before, expected in ((6, 5.0), (5, 2.0), (3, 2.0)):
        own = store.personal(3, "own", before)
        assert own is not None
        assert own["w"].item() == expected
    assert store.personal(3, "own", 1) is None
    assert store.personal(4, "own", 9) is None


def test_a_run_that_went_back_goes_on_from_what_its_clients_had_then(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, versions=4)
    for server_round in (1, 2, 3, 4):
        store.keep_personal(3, "own", server_round, {"w": torch.tensor([float(server_round)])})
    store.keep_personal(3, "own", 2, {"w": torch.tensor([7.0])})
    own = store.personal(3, "own", 3)
    assert own is not None
    assert own["w"].item() == 7.0
    assert sorted(f.name for f in (tmp_path / "personal" / "3").iterdir()) == [
        "own-000001.safetensors", "own-000002.safetensors",
    ]  # fmt: skip
