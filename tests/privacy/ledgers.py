"""What the tests of the ledger share."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

from fedlora.privacy.datasets import Dataset
from fedlora.privacy.filter import Budget
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.spending import Release, Standing

DATASET = Dataset(source="sentences", partitioning="dealt", part="partition-0", fingerprint="as it was")
BUDGET = Budget(target_epsilon=8.0, target_delta=1e-5, accountant="rdp")
WIDE = Budget(target_epsilon=1e6, target_delta=1e-5, accountant="rdp")
FORK = multiprocessing.get_context("fork")


def release(server_round: int = 1, **changes: Any) -> Release:
    given = {
        "run_key": "run", "server_round": server_round, "partition_id": 0, "noise_multiplier": 1.0,
        "sample_rate": 0.05, "steps": 3, **changes,
    }  # fmt: skip
    return Release(**given)


def made(directory: Path, *releases: Release, budget: Budget = WIDE, dataset: Dataset = DATASET) -> Standing:
    """The standing after these releases."""
    ledger = Ledger(directory, dataset)
    for one in releases:
        ledger.reserve(one, budget)
        standing = ledger.standing()
        ledger.released(one)
    return standing
