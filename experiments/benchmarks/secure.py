"""Cost of a round of secure sums beside a plain one: CPU seconds at server and client, and bytes.

python -m experiments.benchmarks.secure [--clients 10,100] [--numbers 150000,1000000] [--dropouts 0,0.1]
    [--bits 32] [--largest-change 1.0] [--sampled] [--out FILE]

All steps of all clients are carried out in this process without messages, so that what is timed is what the
protocol computes. Who drops out does so after sharing, which costs the server most. With ``--sampled`` they
are carried out over `FEW` numbers, and what grows with the numbers is timed by itself and added as often as
it is done: a mask, an addition of a row, an encoding. ``--out`` adds the cells to a JSON list.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import torch

from fedlora import wire
from fedlora.core.parallel import one_thread
from fedlora.secure.collector import Collector
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.masks import add_expanded, bytes_of, packed, unpacked
from fedlora.secure.participant import Participant, Terms

MOST, FEW, TRIES = 400, 1000, 5
"""Examples of a client; numbers and repetitions where costs are sampled."""


@contextmanager
def spent(seconds: Counter[str], who: str) -> Iterator[None]:
    """Add the CPU seconds of a block to what somebody has spent."""
    begin = time.process_time()
    yield
    seconds[who] += time.process_time() - begin  # type: ignore[assignment]


def cell(clients: int, numbers: int, dropouts: float, bits: int, limit: float) -> dict[str, float]:
    """Seconds of the server, secure and plain, and of a client, its bytes, and the mean's relative error."""
    seconds: Counter[str] = Counter()
    terms = Terms(min_clients=3, share=0.66, bits=bits)
    collector, generator = Collector(terms=terms), np.random.default_rng(0)
    fixed, start = FixedPoint(clients, bits, limit, MOST), {"w": torch.zeros(numbers)}
    members: dict[int, Participant] = {}
    for c in range(clients):
        with spent(seconds, "client"):
            members[c] = Participant.advertise(collector.session, c)
        collector.take_keys(c, members[c].public)
    with spent(seconds, "server"):
        collector.close_keys()
    for c in range(clients):
        with spent(seconds, "client"):
            members[c], sealed, digest = members[c].share(collector.keys, terms)
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
            members[c], masked = members[c].mask(range(clients), collector.sealed_for(c), row, terms)
            body = packed(masked, bits)
        with spent(seconds, "server"):
            collector.take_masked(c, unpacked(body, bits))
    for c in there:
        with spent(seconds, "client"):
            told = members[c].confirm(there, terms).unmask()
        with spent(seconds, "server"):
            collector.take_unmasking(c, *told)
    with spent(seconds, "server"):
        mean = wire.from_row(collector.total(), start, fixed).tensors["w"]
    plain /= weights
    error = float((mean.double() - plain).norm() / plain.norm())
    near = len(collector.sealed[0])
    shares = sum(map(len, collector.sealed[0].values())) + 128 + 33 * (near + 1)
    assert collector.graph is not None
    gone = [len(collector.graph.neighbours[c].intersection(there)) for c in range(there.start)]
    return {
        "server": seconds["server"], "plain": seconds["plain server"], "client": seconds["client"] / clients,
        "up": body.nbytes + shares, "error": error, "near": near, "masks": len(there) + sum(gone),
    }  # fmt: skip


def sampled(found: dict[str, float], clients: int, numbers: int, bits: int) -> dict[str, float]:
    """The costs of a cell over `FEW` numbers as they are with so many."""
    seconds: Counter[str] = Counter()
    start, row = {"w": torch.zeros(numbers)}, np.zeros(numbers, f"<u{bytes_of(bits)}")
    trained, fixed = {"w": torch.full((numbers,), 1e-3)}, FixedPoint(clients, bits, 1.0, MOST)
    sums = torch.zeros(numbers, dtype=torch.float64)
    for _ in range(TRIES):
        with spent(seconds, "mask"):
            add_expanded(row, bytes(32))
        with spent(seconds, "row"):
            packed(wire.to_row(start, trained, 50, 1.0, fixed, np.random.default_rng(0)), bits)
        body = packed(row, bits)
        with spent(seconds, "addition"):
            np.add(row, unpacked(body, bits), out=row)
        with spent(seconds, "plain"):
            sums.add_(trained["w"], alpha=50)
    one = {what: spent / TRIES for what, spent in seconds.items()}
    uploads = clients if found["masks"] == clients else int(0.9 * clients)
    return {
        **found, "plain": uploads * one["plain"], "up": found["up"] + (numbers - FEW) * bits / 8,
        "server": found["server"] + found["masks"] * one["mask"] + uploads * one["addition"],
        "client": found["client"] + (found["near"] + 1) * one["mask"] + one["row"],
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", default="10,100")
    parser.add_argument("--numbers", default="150000,1000000")
    parser.add_argument("--dropouts", default="0,0.1")
    parser.add_argument("--bits", type=int, default=32)
    parser.add_argument("--largest-change", type=float, default=1.0)
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print("| clients | numbers | dropped | server s | plain s | client s | MB up, of float32 | error |")
    print("|---|---|---|---|---|---|---|---|")
    numbers = [int(n) for n in given.numbers.split(",")]
    settings = given.bits, given.largest_change
    for clients, share in product(map(int, given.clients.split(",")), map(float, given.dropouts.split(","))):
        with one_thread():
            few = cell(clients, FEW, share, *settings) if given.sampled else {}
        for number in numbers:
            with one_thread():
                found = (
                    sampled(few, clients, number, given.bits)
                    if few
                    else cell(clients, number, share, *settings)
                )
            if given.out:
                kept = json.loads(given.out.read_text()) if given.out.exists() else []
                place = {"clients": clients, "numbers": number, "dropouts": share, "bits": given.bits}
                kept.append({**place, "sampled": given.sampled, **found})
                given.out.write_text(json.dumps(kept, indent=1) + "\n")
            print(
                f"| {clients:,} | {number:,} | {share:.0%} | {found['server']:.2f} | {found['plain']:.2f} "
                f"| {found['client']:.3f} | {found['up'] / 1e6:.2f}, {found['up'] / number / 4:.3f} "
                f"| {found['error']:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
