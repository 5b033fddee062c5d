"""``python -m tests.fuzz COUNT [SEED [SUBJECT..]]``: mutations of files and messages, in equal shares."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.harness import Fault, fuzz
from tests.fuzz.subjects import SUBJECTS
from tests.wire.mutations import TOUCHED
from tests.wire.test_fuzz import spoiled_orders, spoiled_replies

MESSAGES = {"replies": lambda count, _, seed: spoiled_replies(count, seed), "orders": spoiled_orders}


def spoiled(name: str, count: int, home: Path, seed: int) -> Counter[str]:
    """How often came of a subject's mutations what may come of them.

    Raises:
        Fault: something else came.
    """
    if name in SUBJECTS:
        return fuzz(name, SUBJECTS[name], count, home, seed)
    outcomes = MESSAGES[name](count, home, seed)
    if TOUCHED or (wrong := outcomes.keys() - {"refused", "accepted", "opened", "missing"}):
        raise Fault(f"{name}, seed {seed}: {TOUCHED or wrong}")
    return outcomes


def main() -> None:
    count, seed = int(sys.argv[1]), int((sys.argv[2:] or ["0"])[0])
    only = sys.argv[3:] or [*SUBJECTS, *MESSAGES]
    failed = False
    for name in only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as home:
            try:
                outcomes = dict(spoiled(name, count // len(only), Path(home), seed))
            except Fault as fault:
                outcomes, failed = {"fault": str(fault)}, True  # type: ignore[dict-item]
        print(f"{name}: {outcomes} in {time.monotonic() - began:.0f} s", flush=True)
    sys.exit(failed)


main()
