"""Places that cannot be written: found out early where possible, named in one line in any case."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fedlora.assets.fetch import cache_dir, create_directory
from fedlora.core import files
from fedlora.core.files import append_line, check_place, file_stamps, naming, new_directory, write_atomic
from fedlora.errors import ConfigError, RunFailed, of_the_system, system_errors_in_words

FULL = Path("/dev/full")
FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


def names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


@pytest.mark.parametrize("below", [".", "new", "new/and/deeper"])
def test_a_place_that_will_do_is_left_as_it_is(below: str, tmp_path: Path) -> None:
    check_place("--out", tmp_path / below)
    assert names(tmp_path) == set()


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    wrong = {
        "file": r"^--out .*file: is a file, name a directory$",
        "link": r"^--out .*link: is a link to nowhere, which is not there$",
        "file/run": r"^--out .*run: cannot be written in .*file \(Not a directory\)$",
        "link/run": r"^--out .*run: cannot be written in .*link \(No such file or directory\)$",
        "loop/run": r"^--out .*run: cannot be written in .*loop \(Too many levels of symbolic links\)$",
    }
    for name, expected in wrong.items():
        with pytest.raises(ConfigError, match=expected):
            check_place("--out", tmp_path / name)
    assert names(tmp_path) == {"file", "link", "loop"}


@pytest.mark.parametrize("place", ["/proc/run", "/proc/self/deeper/run", "/dev/null/run"])
def test_a_place_where_the_system_lets_nobody_write_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=r"^--out .*: cannot be written in .* \(.*\)$"):
        check_place("--out", Path(place))


def test_a_disk_that_takes_no_block_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: FULL.open("wb"))
    with pytest.raises(ConfigError, match=r"^--out .*: cannot be written \(No space left on device\)$"):
        check_place("--out", tmp_path)


def test_a_line_on_a_full_disk_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").symlink_to(FULL)
    with pytest.raises(OSError, match=r"No space left on device: '.*rounds.jsonl'"):
        append_line(tmp_path / "rounds.jsonl", "{}")


def test_a_file_on_a_full_disk_is_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", "before")

    def full(_: int) -> None:
        raise FULL_DISK

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        write_atomic(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "before"
    assert names(tmp_path) == {"a"}


@pytest.mark.parametrize("error", [FULL_DISK, SafetensorError("I/O error: No space left on device")])
def test_a_directory_on_a_full_disk_is_the_one_before(error: Exception, tmp_path: Path) -> None:
    with new_directory(tmp_path / "a") as fresh:
        (fresh / "file").write_text("before")
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"), new_directory(tmp_path / "a"):
        raise error
    assert (tmp_path / "a" / "file").read_text() == "before"
    assert names(tmp_path) == {"a"}


def test_another_files_name_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'elsewhere'"), naming(tmp_path):
        open("elsewhere")  # noqa: SIM115


def test_what_is_prepared_is_not_begun_where_it_cannot_stay(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    begun: list[Path] = []
    with pytest.raises(ConfigError, match=r"^prepared data .* cannot be written in .*file \(Not a dir"):
        create_directory(tmp_path / "file" / "prepared", begun.append)
    assert begun == []


def test_what_is_prepared_in_somebody_elses_cache_is_used(tmp_path: Path) -> None:
    """Nothing is written, not even a lock, where the directory is there."""
    (tmp_path / "there").mkdir()
    create_directory(tmp_path / "there", lambda draft: pytest.fail("made again"))
    assert names(tmp_path) == {"there"}


def test_a_user_without_a_home_is_told_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", "~nobody-of-that-name/cache")
    with pytest.raises(ConfigError, match=r"^FEDLORA_CACHE = '~nobody-of-that-name/cache': there is no home"):
        cache_dir()


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (OSError(errno.EROFS, "Read-only file system", "a/b"), ConfigError, "a/b: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), ConfigError, "a: Permission denied"),
        (FULL_DISK, RunFailed, "No space left on device; what was written before is kept"),
        (OSError("3 requested and 0 written"), RunFailed, "OSError: 3 requested and 0 written"),
    ],
)
def test_what_the_system_says_is_one_line(error: OSError, kind: type[Exception], line: str) -> None:
    found = of_the_system(error)
    assert type(found) is kind
    assert str(found) == line


def test_a_closed_pipe_is_no_failure_of_ours() -> None:
    with pytest.raises(BrokenPipeError), system_errors_in_words():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


# --- what a file is known by -------------------------------------------------------------------------


@pytest.mark.parametrize("hashed", [2**26, 0], ids=["content", "stamps"])
def test_a_copy_with_the_same_size_and_time_is_another_file(
    hashed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "HASHED_BYTES", hashed)
    for name, text in (("a", "good"), ("b", "evil")):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, ns=(1, 1))
    before = file_stamps(str(tmp_path / "a"))
    assert file_stamps(str(tmp_path / "a")) == before
    shutil.copy2(tmp_path / "b", tmp_path / "a")
    after = file_stamps(str(tmp_path / "a"))
    assert after != before
    os.replace(tmp_path / "b", tmp_path / "a")
    assert (file_stamps(str(tmp_path / "a")) == after) is (hashed > 0), "the same content, another inode"


def test_small_files_are_known_by_their_content_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("good")
    before = file_stamps(str(tmp_path))
    os.utime(tmp_path / "a", ns=(1, 1))
    assert file_stamps(str(tmp_path)) == before
