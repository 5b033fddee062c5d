"""Times a ledger's reserve with its reported epsilon, beside the account that noise is calibrated with.

Both in one run and by turns, so that their ratio holds on a busy machine, too.

    python -m experiments.benchmarks.ledger_reserve
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from fedlora.privacy.calibration import calibrate_noise, epsilon_of
from fedlora.privacy.datasets import Dataset
from fedlora.privacy.filter import Budget
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.spending import Release

ROUNDS, STEPS, RATE = 60, 10, 0.05


def main() -> None:
    """Sixty rounds of one client."""
    budget = Budget(target_epsilon=8.0, target_delta=1e-5, accountant="prv")
    noise = calibrate_noise(8.0, 1e-5, RATE, ROUNDS * STEPS)
    quick, slow, busy = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        ledger = Ledger(Path(directory) / "ledger", Dataset(source="benchmark"))
        for number in range(1, ROUNDS + 1):
            release = Release(
                run_key="run", server_round=number, partition_id=0, noise_multiplier=noise, sample_rate=RATE,
                steps=STEPS,
            )  # fmt: skip
            began, worked = time.perf_counter(), time.process_time()
            ledger.reserve(release, budget, planned_steps=ROUNDS * STEPS)
            quick.append(time.perf_counter() - began)
            busy.append(time.process_time() - worked)
            began = time.perf_counter()
            epsilon_of(((noise, RATE, number * STEPS),), 1e-5, "prv")
            slow.append(time.perf_counter() - began)
    ours, other = statistics.median(quick), statistics.median(slow)
    print(f"reserve with its epsilon: median {1e3 * ours:.2f} ms, least {1e3 * min(quick):.2f} ms")
    print(
        f"of it on the processor: median {1e3 * statistics.median(busy):.2f} ms; the rest waits for the disk"
    )
    print(f"that epsilon alone by the calibrating account: median {1e3 * other:.2f} ms")
    print(f"ratio of the medians: {ours / other:.3f}")


if __name__ == "__main__":
    main()
