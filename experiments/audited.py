"""What pip-audit found, and what it did not look up: ``make audit``.

    python experiments/audited.py build/audit.json

pip-audit itself ends well where no index of vulnerabilities answers. Run by an interpreter without fedlora.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def said(packages: Iterable[Mapping[str, Any]]) -> tuple[list[str], int]:
    """Lines for people, and how many vulnerabilities are known.

    Args:
        packages: ``dependencies`` of pip-audit's JSON.

    >>> said([{"name": "a", "skip_reason": "no index"}, {"name": "b", "version": "1", "vulns": []}])
    (['1 of 2 packages were looked up, 1 could not be (no index?); 0 known vulnerabilities'], 0)
    """
    known = list(packages)
    found = [
        f"{one['name']} {one['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'none'}"
        for one in known
        for v in one.get("vulns", [])
    ]
    skipped = sum("skip_reason" in one for one in known)
    total = (
        f"{len(known) - skipped} of {len(known)} packages were looked up, {skipped} could not be "
        f"(no index?); {len(found)} known vulnerabilities"
    )
    return [*found, total], len(found)


if __name__ == "__main__":
    lines, count = said(json.loads(Path(sys.argv[1]).read_text())["dependencies"])
    print(*lines, sep="\n")
    sys.exit(1 if count else 0)
