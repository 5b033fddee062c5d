"""What epsilon the accounting of FedSVD's released code really buys, beside the ledger's.

The code calibrates noise for R rounds of tau steps of B of n examples, where the server picks a fraction f of
the clients in each round:

* until January 2026 by ``R tau`` steps at sample rate ``f B / n``, as if each *step* drew its clients anew;
* since then by ``f R tau`` steps at rate ``1 / ceil(n / B)``: as often as a client is picked on average.

The ledger charges ``B / n`` for each step that the client really takes. Prints a Markdown table:
``python -m experiments.released_accounting``.
"""

from __future__ import annotations

import math
from functools import cache

from experiments.marked import markdown
from fedlora.privacy.calibration import calibrate_noise, epsilon_spent

EXAMPLES, BATCH_SIZE, LOCAL_STEPS, DELTA = 2356, 48, 3, 1e-5
"""The first client of ``experiments/privacy.toml``."""
SETTINGS = ((5, 1.0), (20, 0.5))
"""Rounds, and the fraction of clients in each: of that study, and a longer run with half of them."""
TARGETS = (1.0, 3.0, 6.0)


@cache
def rows() -> list[list[str]]:
    """For each setting and target: noise multiplier and epsilon, on average to at most, three times."""
    rate = BATCH_SIZE / EXAMPLES
    lines = []
    for rounds, fraction in SETTINGS:
        most = rounds * LOCAL_STEPS
        mean = round(fraction * most)
        for target in TARGETS:
            noises = (
                calibrate_noise(target, DELTA, rate, most),
                calibrate_noise(target, DELTA, fraction * rate, most),
                calibrate_noise(target, DELTA, 1 / math.ceil(EXAMPLES / BATCH_SIZE), mean),
            )
            spent = [_spent(noise, rate, mean, most) for noise in noises]
            lines.append([f"{rounds}, {fraction:g}", f"{target:g}", *spent])
    return lines


def accounting_table() -> str:
    """The same in Markdown."""
    return markdown(["rounds, fraction", "target", "ledger", "code until January 2026", "code since"], rows())


def _spent(noise: float, rate: float, mean: int, most: int) -> str:
    on_average, at_most = (epsilon_spent(noise, rate, steps, DELTA) for steps in (mean, most))
    return f"{noise:.3f}, {on_average:.2f} to {at_most:.2f}"


if __name__ == "__main__":
    print(accounting_table())
