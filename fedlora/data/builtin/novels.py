"""The six novels of Jane Austen (public domain), each a domain, from Debian's package r-cran-janeaustenr.

The package is downloaded by apt-get and unpacked without being installed; nobody needs to be root.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

from datasets import Dataset

from fedlora.assets.fetch import announced, cache_dir, create_directory, file_sha256
from fedlora.core.code import need_extra
from fedlora.data.split import PARAGRAPH
from fedlora.errors import AssetError, first_line

PACKAGE = "r-cran-janeaustenr"
FOLDER = "usr/lib/R/site-library/janeaustenr/data"
FILES = {
    "Rdata.rdb": "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21",
    "Rdata.rdx": "cab8cbe4ce965d3b42b35c03383bafccc0eb78151f70e4748ead45270470c22f",
}
OTHERWISE = (
    "the alternatives are a jsonl file with a column of texts, or data.name = 'sentiment', whose sentences "
    "are then text by domain"
)
SIZE_BYTES = 4
"""Of the length before each compressed object."""


def novels_table() -> Dataset:
    """Six rows with text, the whole novel with an empty line between paragraphs, and domain, its title.

    Raises:
        AssetError: the package cannot be had.
    """
    home = cache_dir() / "assets" / "novels"
    create_directory(home, _fetch)
    texts = _texts(home)
    return Dataset.from_dict({"text": list(texts.values()), "domain": list(texts)})


def is_cached() -> bool:
    """Whether `novels_table` would answer without a download."""
    return (cache_dir() / "assets" / "novels").is_dir()


def _fetch(draft: Path) -> None:
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise AssetError(
                f"data.name = 'novels': comes from Debian's package {PACKAGE} and {program} is not here; "
                f"{OTHERWISE}"
            )
    with (
        announced(f"fetching novels ({PACKAGE}) into {cache_dir()}"),
        tempfile.TemporaryDirectory(prefix="fedlora-") as temporary,
    ):
        folder = Path(temporary)
        _do(["apt-get", "download", "--quiet", PACKAGE], folder)
        _do(["dpkg-deb", "--extract", str(next(folder.glob("*.deb"))), str(folder / "unpacked")], folder)
        for name, sha256 in FILES.items():
            source = folder / "unpacked" / FOLDER / name
            found = file_sha256(source) if source.is_file() else "none"
            if found != sha256:
                raise AssetError(
                    f"data.name = 'novels': {name} of {PACKAGE} has sha256 {found}, pinned is {sha256}; "
                    f"{OTHERWISE}"
                )
            shutil.copyfile(source, draft / name)


def _do(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssetError(
            f"data.name = 'novels': {command[0]} could not fetch {PACKAGE} ({first_line(done.stderr)}); "
            f"{OTHERWISE}"
        )


def _texts(home: Path) -> dict[str, str]:
    """Title -> text, out of R's lazy-load database: an index, and zlib behind a length for each object."""
    need_extra("offline", "data.name = 'novels'")
    import rdata

    texts = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the kind of file, which has no usual ending
        index: Any = rdata.read_rds(home / "Rdata.rdx")
        database = (home / "Rdata.rdb").read_bytes()
        for title, (start, size) in index["variables"].items():
            packed = database[int(start) + SIZE_BYTES : int(start) + int(size)]
            lines: Any = rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress(packed)))
            texts[str(title)] = _paragraphs([str(line).strip() for line in lines])
    return texts


def _paragraphs(lines: list[str]) -> str:
    """Lines between empty ones as one paragraph each."""
    blocks = "\n".join(lines).split(PARAGRAPH)
    return PARAGRAPH.join(" ".join(block.split()) for block in blocks if block.strip())
