"""Cost of a round of secure sums beside a plain one: CPU seconds at server and client, and bytes.

python -m experiments.benchmarks.secure [--clients 10,100] [--numbers 150000,1000000] [--dropouts 0,0.1]

All steps of all clients are carried out in this process without messages, so that what is timed is what the
protocol computes. Who drops out does so after sharing, which costs the server most.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch

from fedlora import wire
from fedlora.core.parallel import one_thread
from fedlora.secure.collector import Collector
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.participant import Participant, Terms

TERMS = Terms(min_clients=3, share=0.66, bits=32)
MOST = 400
"""Examples of a client."""


@contextmanager
def spent(seconds: Counter[str], who: str) -> Iterator[None]:
    """Add the CPU seconds of a block to what somebody has spent."""
    begin = time.process_time()
    yield
    seconds[who] += time.process_time() - begin  # type: ignore[assignment]


def cell(clients: int, numbers: int, dropouts: float) -> dict[str, float]:
    """Seconds of the server, secure and plain, and of a client, its bytes, and the mean's relative error."""
    seconds: Counter[str] = Counter()
    collector, generator = Collector(terms=TERMS), np.random.default_rng(0)
    fixed, start = FixedPoint(clients, TERMS.bits, 1.0, MOST), {"w": torch.zeros(numbers)}
    members: dict[int, Participant] = {}
    for c in range(clients):
        with spent(seconds, "client"):
            members[c] = Participant.advertise(collector.session, c)
        collector.take_keys(c, members[c].public)
    with spent(seconds, "server"):
        collector.close_keys()
    for c in range(clients):
        with spent(seconds, "client"):
            members[c], sealed, digest = members[c].share(collector.keys, TERMS)
        with spent(seconds, "server"):
            collector.take_shares(c, sealed, digest)
    there = range(int(dropouts * clients), clients)
    plain, weights = torch.zeros(numbers, dtype=torch.float64), 0
    for c in there:
        weight = 50 + c % 300
        trained = {"w": torch.from_numpy(generator.normal(0, 1e-3, numbers)).float()}
        with spent(seconds, "plain server"):
            plain.add_(trained["w"], alpha=weight)
        weights += weight
        with spent(seconds, "client"):
            row = wire.to_row(start, trained, weight, 1.0, fixed, generator)
            members[c], masked = members[c].mask(range(clients), collector.sealed_for(c), row, TERMS)
        with spent(seconds, "server"):
            collector.take_masked(c, masked)
    for c in there:
        with spent(seconds, "client"):
            told = members[c].confirm(there, TERMS).unmask()
        with spent(seconds, "server"):
            collector.take_unmasking(c, *told)
    with spent(seconds, "server"):
        mean = wire.from_row(collector.total(), start, fixed).tensors["w"]
    plain /= weights
    error = float((mean.double() - plain).norm() / plain.norm())
    shares = sum(map(len, collector.sealed[0].values())) + 128 + 33 * (len(collector.sealed[0]) + 1)
    return {
        "server": seconds["server"], "plain server": seconds["plain server"],
        "client": seconds["client"] / clients, "up": masked.nbytes + shares, "error": error,
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="10,100")
    parser.add_argument("--numbers", default="150000,1000000")
    parser.add_argument("--dropouts", default="0,0.1")
    given = parser.parse_args()
    columns = [[int(n) for n in given.clients.split(",")], [int(n) for n in given.numbers.split(",")]]
    print("| clients | numbers | dropped | server s | plain s | client s | MB up, of float32 | error |")
    print("|---|---|---|---|---|---|---|---|")
    for clients, numbers, share in product(*columns, map(float, given.dropouts.split(","))):
        with one_thread():
            found = cell(clients, numbers, share)
        print(
            f"| {clients} | {numbers:,} | {share:.0%} | {found['server']:.2f} | {found['plain server']:.2f} "
            f"| {found['client']:.3f} | {found['up'] / 1e6:.2f}, {found['up'] / numbers / 4:.3f} "
            f"| {found['error']:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
