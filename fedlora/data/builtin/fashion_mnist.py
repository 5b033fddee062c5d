"""Fashion-MNIST (Xiao et al., arXiv 1708.07747, MIT licence) out of Debian's package.

The files of an installed ``dataset-fashion-mnist`` are used where they are. Else the package is downloaded
by apt, which checks its signature, and unpacked into the cache; that needs no root, and runs nothing of the
package. The files themselves are pinned here.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from fedlora.assets.fetch import announced, cache_dir, create_directory, file_sha256
from fedlora.errors import AssetError, first_line

PACKAGE = "dataset-fashion-mnist"
FOLDER = Path("usr/share/datasets/fashion-mnist")
LABEL_NAMES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
INSTEAD = 'install Debian\'s dataset-fashion-mnist, or use data.name = "digits"'


def read_fashion_mnist(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (images, 28, 28) uint8 and labels (images,) int64 of ``train`` (60,000) or ``t10k`` (10,000).

    Raises:
        AssetError: the package is neither installed nor to be had, or a file is not the pinned one.
    """
    home = _home()
    images, labels = (home / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    return _idx(images), _idx(labels).astype(np.int64)


def _home() -> Path:
    installed = Path("/") / FOLDER
    if installed.is_dir():
        _check(installed)
        return installed
    home = cache_dir() / "assets" / PACKAGE
    create_directory(home, _fetch)
    return home


def _fetch(draft: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise AssetError(f"data 'fashion-mnist': there is no apt here to fetch it with; {INSTEAD}")
    with (
        announced(f"fetching fashion-mnist (Debian's {PACKAGE}, 31 MB) into {cache_dir()}"),
        tempfile.TemporaryDirectory(prefix="fedlora-") as temporary,
    ):
        _run(["apt-get", "download", "--quiet", PACKAGE], temporary)
        archive = next(Path(temporary).glob("*.deb"))
        _run(["dpkg-deb", "--extract", archive.name, "content"], temporary)
        for file in FILES:
            shutil.copyfile(Path(temporary) / "content" / FOLDER / file, draft / file)
    _check(draft)


def _run(command: list[str], directory: str) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = first_line(done.stderr.removeprefix("E: "), "no message")
        raise AssetError(f"data 'fashion-mnist': {command[0]} failed ({reason}); {INSTEAD}")


def _check(home: Path) -> None:
    for file, sha256 in FILES.items():
        if not (home / file).is_file() or file_sha256(home / file) != sha256:
            raise AssetError(f"data 'fashion-mnist': {home / file} is not the pinned file; {INSTEAD}")


def identity() -> str:
    """A hash of the pinned contents; needs no download."""
    return hashlib.sha256(repr(sorted(FILES.items())).encode()).hexdigest()


def _idx(path: Path) -> np.ndarray:
    """An IDX file: two zero bytes, type 8 (uint8), the number of dimensions, big-endian sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).astype(np.int64)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
