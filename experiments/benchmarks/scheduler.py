"""Times the scheduler of rounds that do not wait, with a large population and no training.

    python -m experiments.benchmarks.scheduler --clients 1000000 --in-flight 1000 --buffer-size 100

What runs is the strategy, the Grid in simulated time and a server's aggregation, by default of one layer
of rank 1; a client's reply is what it was sent. Prints seconds of the processor, and the largest memory.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from collections.abc import Iterable

import torch
from flwr.app import Message, MetricRecord, RecordDict

from fedlora import wire
from fedlora.config import from_flat
from fedlora.core.factors import LoraFactors
from fedlora.simulation.devices import devices_of
from fedlora.simulation.local_grid import LocalGrid
from fedlora.simulation.timed_grid import TimedGrid
from strategies.buffered import BufferedStrategy
from strategies.registry import make_rule


class Echo(LocalGrid):
    """Grid whose clients send back what they were sent, as PEFT clients that know nothing of fedlora do."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies at once."""
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"{message.metadata.dst_node_id}"
            arrays = wire.array_record(message.content)
            assert arrays is not None
            metrics = MetricRecord({"num-examples": 1})
            yield Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def main() -> None:
    """Carry out the aggregations."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=1_000_000)
    parser.add_argument("--in-flight", type=int, default=1000)
    parser.add_argument("--buffer-size", type=int, default=100)
    parser.add_argument("--aggregations", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--width", type=int, default=4, help="a layer is so many rows of so many columns")
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--profiles", default="phones-and-workstations")
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    config = from_flat(
        {
            "devices.profiles": given.profiles,
            "devices.buffer-size": given.buffer_size,
            "devices.in-flight": given.in_flight,
            "devices.deadline": 3600.0,
        }
    )
    begun = time.process_time()
    grid = TimedGrid(
        inner=Echo(range(given.clients)),
        devices=devices_of(config, range(given.clients)),
        config=config.devices,
        timeout=3600.0,
        seed=config.seed,
        tokens=lambda partition: 1000.0,
        bytes_up=lambda partition: 0,
        trains_anyway=lambda task: False,
        fraction=1.0,
    )
    strategy = BufferedStrategy(
        make_rule("fedavg"), in_flight=given.in_flight, buffer_size=given.buffer_size, fraction_evaluate=0.0,
        diagnostics=False,
    )  # fmt: skip
    rank, width = given.rank, given.width
    layer = LoraFactors(torch.ones(rank, width), torch.zeros(width, rank), 1.0)
    adapters = {f"layer.{number}": layer for number in range(given.layers)}
    strategy.open(wire.to_record(wire.to_peft(adapters, {})))
    ready = time.process_time()
    started = refused = 0
    for report in strategy.rounds(grid, last=given.aggregations):
        refused += len(report.refused)
    seconds, started = time.process_time() - ready, sum(strategy.selection.participations.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{given.clients:,} clients, {given.in_flight:,} at work, {given.aggregations:,} aggregations of "
        f"{given.buffer_size}: {started:,} started, {refused:,} of no use; "
        f"{grid.seconds / 3600:.1f} simulated hours"
    )
    print(f"{ready - begun:.1f} s to begin, {seconds:.1f} s of rounds, of the processor; {memory:.2f} GiB")


if __name__ == "__main__":
    main()
