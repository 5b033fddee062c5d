from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from fedlora.assets import fetch
from fedlora.assets.fetch import ASSETS, Asset, asset_identity, asset_path, cache_dir, create_directory
from fedlora.assets.models import converted_home, model_directory
from fedlora.core.sealed import sealed
from fedlora.errors import AssetError

CONTENT = b"twelve bytes"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def offline_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pip finds nothing but what lies in one directory."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))


def wheel(tmp_path: Path, members: dict[str, bytes]) -> str:
    """Put a wheel of fedlora-probe 1.0 on the index and return its hash."""
    info = "fedlora_probe-1.0.dist-info"
    members = {
        **members,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: fedlora-probe\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = tmp_path / "index" / "fedlora_probe-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return sha256(path.read_bytes())


def register(monkeypatch: pytest.MonkeyPatch, archive: str, files: dict[str, str], tar: str = "") -> None:
    probe = Asset(
        package="fedlora-probe", version="1.0", sha256=archive, tar=tar, folder="probe/data", files=files
    )
    monkeypatch.setitem(ASSETS, "probe", probe)


def test_only_the_pinned_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = wheel(tmp_path, {"probe/data/a.txt": CONTENT, "probe/data/b.txt": b"other", "probe/c.py": b""})
    register(monkeypatch, archive, {"a.txt": sha256(CONTENT)})
    home = asset_path("probe")
    assert [file.name for file in home.iterdir()] == ["a.txt"]
    assert (home / "a.txt").read_bytes() == CONTENT


def test_fetched_once_then_found_without_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, wheel(tmp_path, {"probe/data/a.txt": CONTENT}), {"a.txt": sha256(CONTENT)})
    home = asset_path("probe")
    for file in (tmp_path / "index").iterdir():
        file.unlink()
    assert asset_path("probe") == home


def test_files_inside_a_tar_inside_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("probe/data/a.txt")
        member.size = len(CONTENT)
        tar.addfile(member, io.BytesIO(CONTENT))
    archive = wheel(tmp_path, {"inner/x.tar.gz": packed.getvalue()})
    register(monkeypatch, archive, {"a.txt": sha256(CONTENT)}, tar="inner/x.tar.gz")
    assert (asset_path("probe") / "a.txt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("archive_pin", "files", "said"),
    [
        ("0" * 64, {"a.txt": sha256(CONTENT)}, "HASHES"),
        (None, {"a.txt": sha256(b"another")}, "pinned is"),
        (None, {"missing.txt": sha256(CONTENT)}, "holds no probe/data/missing.txt"),
    ],
)
def test_what_differs_from_its_pin_never_appears(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    archive_pin: str | None,
    files: dict[str, str],
    said: str,
) -> None:
    archive = wheel(tmp_path, {"probe/data/a.txt": CONTENT})
    register(monkeypatch, archive_pin or archive, files)
    with pytest.raises(AssetError, match=said) as caught:
        asset_path("probe")
    assert "\n" not in str(caught.value)
    assert not [path for path in (cache_dir() / "assets").iterdir() if path.is_dir()]


def test_unreachable_index_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "0" * 64, {"a.txt": sha256(CONTENT)})
    with pytest.raises(AssetError, match=r"fedlora-probe==1\.0") as caught:
        asset_path("probe")
    assert "\n" not in str(caught.value)


def test_a_file_lost_from_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, wheel(tmp_path, {"probe/data/a.txt": CONTENT}), {"a.txt": sha256(CONTENT)})
    (asset_path("probe") / "a.txt").unlink()
    with pytest.raises(AssetError, match=r"a\.txt is missing"):
        asset_path("probe")


def test_a_file_that_changed_in_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, wheel(tmp_path, {"probe/data/a.txt": CONTENT}), {"a.txt": sha256(CONTENT)})
    file = asset_path("probe") / "a.txt"
    file.write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:])
    os.utime(file, ns=(1, 1))  # the clock of a file system may stand still in between
    with pytest.raises(AssetError, match=r"a\.txt is not what was fetched .*, delete .* to fetch it again"):
        asset_path("probe")


def test_a_converted_model_that_changed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = converted_home()
    home.mkdir(parents=True)
    (home / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(AssetError, match=r"sha256\.json: is missing, which says what was converted, delete"):
        model_directory("smollm2")
    (home / "sha256.json").write_text(
        json.dumps(sealed({"files": {"model.safetensors": sha256(b"weights")}}))
    )
    assert model_directory("smollm2") == home
    (home / "model.safetensors").write_bytes(b"weighTs")
    os.utime(home / "model.safetensors", ns=(1, 1))
    with pytest.raises(AssetError, match=r"model\.safetensors: is not what was converted, delete"):
        model_directory("smollm2")


def test_unknown_asset() -> None:
    with pytest.raises(AssetError, match="unknown, there are minilm, sentiment, smollm2, newsgroups, digits"):
        asset_path("nothing")


def test_identity_follows_the_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "0" * 64, {"a.txt": "1"})
    first = asset_identity("probe")
    register(monkeypatch, "0" * 64, {"a.txt": "2"})
    assert first != asset_identity("probe")


def test_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    final = tmp_path / "made" / "here"

    def broken(draft: Path) -> None:
        (draft / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_directory(final, broken)
    assert not [path for path in final.parent.iterdir() if path.is_dir()]
    create_directory(final, lambda draft: (draft / "whole").touch())
    assert [file.name for file in final.iterdir()] == ["whole"]


def test_a_killed_process_leaves_no_final_directory(tmp_path: Path) -> None:
    final = tmp_path / "made"
    code = (
        "import os, pathlib, sys; from fedlora.assets.fetch import create_directory\n"
        "def fill(draft):\n    (draft / 'half').touch()\n    os._exit(9)\n"
        "create_directory(pathlib.Path(sys.argv[1]), fill)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(final)], check=False)
    assert done.returncode == 9
    assert not final.exists()
    create_directory(final, lambda draft: (draft / "whole").touch())
    assert [file.name for file in final.iterdir()] == ["whole"]


def test_two_at_once_fill_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def slow(draft: Path) -> None:
        calls.append(1)
        time.sleep(0.2)
        (draft / "file").touch()

    threads = [threading.Thread(target=create_directory, args=(tmp_path / "x", slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert (tmp_path / "x" / "file").is_file()


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEDLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fedlora"


def test_every_pin_is_a_sha256() -> None:
    pins = [pin for asset in ASSETS.values() for pin in (asset.sha256, *asset.files.values())]
    assert all(len(pin) == 64 and set(pin) <= set("0123456789abcdef") for pin in pins)


@pytest.mark.real
@pytest.mark.parametrize("name", ["minilm", "sentiment", "newsgroups"])
def test_the_cached_files_have_their_pinned_hashes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    if not fetch.is_cached(name):
        pytest.skip(f"{ASSETS[name].requirement} is not in the cache (asset_path({name!r}) fetches it)")
    home = asset_path(name)
    assert {file: fetch.file_sha256(home / file) for file in ASSETS[name].files} == ASSETS[name].files
