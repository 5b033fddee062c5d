"""``python -m tests.fuzz COUNT [SEED [SUBJECT..]]``: so many mutations of files, in equal shares."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.harness import Fault, fuzz
from tests.fuzz.subjects import SUBJECTS


def main() -> None:
    count, seed = int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0])
    only = sys.argv[3:] or list(SUBJECTS)
    failed = False
    for name in only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as home:
            try:
                outcomes = dict(fuzz(name, SUBJECTS[name], count // len(only), Path(home), seed))
            except Fault as fault:
                outcomes, failed = {"fault": str(fault)}, True  # type: ignore[dict-item]
        print(f"{name}: {outcomes} in {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(failed)


main()
