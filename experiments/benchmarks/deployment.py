"""Seconds a round in deployment, beside a Flower app that does nothing and the same run in simulation.

    python -m experiments.benchmarks.deployment [--nodes 3] [--rounds 8]

A whole federation runs on this machine: SuperLink, gate and nodes, TLS and node keys on. *Overhead* is what
a steady round takes beyond the same round in simulation, where the same training runs in resident processes;
*steady* leaves out the first round, which loads everything, and the last, which evaluates. Run it on an idle
machine; it takes about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.benchmarks.hardware import hardware
from fedlora.config import RunConfig, read_config
from fedlora.core.files import write_atomic
from fedlora.deployment.operator.create import create
from fedlora.deployment.operator.layout import CONNECTION, Layout
from fedlora.deployment.operator.loopback import Loopback
from fedlora.deployment.operator.operate import flwr, run_status
from fedlora.deployment.operator.submit import COMPLETED, submit
from fedlora.server.directory import RunDirectory
from fedlora.simulation.simulate import simulate

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BASE = HERE.parent / "federation.toml"
MODELS = ("tiny", "minilm")
KEPT, PLAIN = "kept", "loaded for each message"
NOTHING, SIMULATED = "an app that does nothing", "in simulation"


def main() -> None:
    """All measurements, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8, help="of every run, at least 4")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    options = parser.parse_args()
    if options.rounds < 4 or options.nodes < 1:
        parser.error("--rounds must be >= 4, --nodes >= 1")
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for model in options.models:
            config = configured(model, options.nodes, options.rounds)
            simulate(config, home / f"simulated-{model}")
            note(found, f"{model}, {SIMULATED}", seconds_of(home / f"simulated-{model}"))
        for keep in (True, False):
            way = KEPT if keep else PLAIN
            layout = create(home / way.replace(" ", "-"), options.nodes)
            keep_model(layout, keep)
            with Loopback(layout, lambda line: None):
                if keep:
                    note(found, NOTHING, nothing(layout, options.nodes, options.rounds, home / "nothing"))
                for model in options.models:
                    out = home / f"{model}-{keep}"
                    submit(layout, configured(model, options.nodes, options.rounds), out)
                    note(found, f"{model}, {way}", seconds_of(out))
    keep_results(found, options)


def configured(model: str, nodes: int, rounds: int) -> RunConfig:
    """`experiments/federation.toml` with another model and number of rounds; evaluated at the end only."""
    config = read_config(BASE, {"model.name": model, "num-server-rounds": rounds, "evaluate-every": rounds})
    return replace(config, min_available_nodes=nodes, min_train_nodes=nodes, partitions=f"0-{nodes - 1}")


def keep_model(layout: Layout, keep: bool) -> None:
    """Write ``keep-model`` into every node's settings."""
    for entry in layout.nodes:
        file = layout.node(entry) / "node.toml"
        text = file.read_text()
        assert text.count("keep-model = true") == 1
        file.write_text(text.replace("keep-model = true", f"keep-model = {str(keep).lower()}"))


def nothing(layout: Layout, nodes: int, rounds: int, out: Path) -> list[float]:
    """Seconds of each round of the app that does nothing, on Flower's own Grid."""
    settings = f'num-server-rounds={rounds} nodes={nodes} out="{out}"'
    app = str(HERE / "noop")
    answer = flwr(layout, "run", app, CONNECTION, "--format", "json", "--run-config", settings)
    run_id = str(answer["run-id"])
    while (status := run_status(layout, run_id)[0]) != COMPLETED:
        if status.startswith("finished"):
            sys.exit(f"deployment.py: the app that does nothing is {status}")
    seconds: list[float] = json.loads(out.read_text())
    return seconds


def seconds_of(path: Path) -> list[float]:
    """Seconds of each round of a run."""
    return [record["seconds"] for record in RunDirectory(path, resume=True).rounds()]


def note(found: dict[str, list[float]], name: str, seconds: list[float]) -> None:
    """Keep a measurement and say it."""
    found[name] = [round(s, 2) for s in seconds]
    print(f"{name:40} {steady(seconds):6.2f} s a round", file=sys.stderr, flush=True)


def steady(seconds: Sequence[float]) -> float:
    """The median without the first round and the last."""
    return statistics.median(seconds[1:-1])


def keep_results(found: dict[str, list[float]], options: argparse.Namespace) -> None:
    """``results/deployment.json`` and the table."""
    record: dict[str, Any] = {
        "nodes": options.nodes,
        "seconds": found,
        "hardware": hardware(),
        "packages": {name: version(name) for name in ("flwr", "torch", "transformers")},
    }
    write_atomic(RESULTS / "deployment.json", json.dumps(record, indent=1) + "\n")
    floor = steady(found[NOTHING])
    machine = record["hardware"]
    lines = [
        "# Deployment",
        "",
        f"{machine['cpu']}, {machine['cores']} cores for the server and {options.nodes} nodes; "
        f"flwr {record['packages']['flwr']}, torch {machine['torch']}. Medians of "
        f"{options.rounds - 2} steady rounds. Overhead: beyond the same round in simulation; "
        f"the floor is the app that does nothing, on Flower's own Grid.",
        "",
        "| what | s a round | from .. to | overhead | of the floor |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in found.items():
        own, spread = steady(seconds), sorted(seconds[1:-1])
        model = name.partition(",")[0]
        base = 0.0 if name == NOTHING else steady(found[f"{model}, {SIMULATED}"])
        over = "" if name.endswith(SIMULATED) else f"{own - base:.1f} s"
        share = "" if name.endswith(SIMULATED) else f"{(own - base) / floor:.2f}x"
        lines.append(f"| {name} | {own:.1f} | {spread[0]:.1f} .. {spread[-1]:.1f} | {over} | {share} |")
    text = "\n".join(lines) + "\n"
    write_atomic(RESULTS / "deployment.md", text)
    print(text)


if __name__ == "__main__":
    main()
