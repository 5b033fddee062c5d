"""The app as Flower Hub takes it: ``python -m experiments.hub DIR`` writes what ``flwr app publish`` sends.

The repository itself is refused for its kept results, files of more than a megabyte. What is written is
Flower's own bundle, unpacked: the code, ``pyproject.toml``, README and LICENSE.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).parents[1]


def bundle(out: Path) -> Path:
    """Write the app into a new directory, whose name is the app's on the Hub.

    Raises:
        SystemExit: there is something already.
    """
    if out.exists():
        raise SystemExit(f"{out}: is there already, name a new directory")
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as files:
        files.extractall(out, [name for name in files.namelist() if not name.startswith(".info")])
    return out


if __name__ == "__main__":
    bundle(Path(sys.argv[1]))
