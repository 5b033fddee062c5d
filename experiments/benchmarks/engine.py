"""The engine beside a bare PyTorch loop and a stock Flower app: seconds, memory, and the same adapter.

    python -m experiments.benchmarks.engine [--only PATTERN ...] [--rounds N] [--device auto] [--quick]

Each run starts from nothing in processes of its own, as a user starts it. Figures of a cell that was
measured with the same code, versions, device and rounds are kept unless ``--again``. Run it on an idle
machine: on two cores the default cells take about half an hour. ``--list`` names all cells.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.engine_cells import COHORT, HOME, Cell, chosen_cells
from experiments.benchmarks.engine_chart import draw
from experiments.benchmarks.engine_figures import Figures
from experiments.benchmarks.engine_probe import probe
from experiments.benchmarks.engine_table import table
from experiments.benchmarks.hardware import hardware
from fedlora.config import read_config
from fedlora.core.code import top_packages
from fedlora.errors import ConfigError
from fedlora.models import pick_device
from fedlora.server.identity import source_digest

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
PACKAGES = ("flwr", "torch", "transformers", "peft", "opacus", "ray")
MICRO = "micro"


def main() -> None:
    """The cells one after another; table and chart are written after each."""
    options = arguments()
    try:
        device = pick_device(options.device).type
    except ConfigError as error:
        sys.exit(f"engine.py: {error}")
    cells = chosen_cells(options.only, options.rounds, quick=options.quick)
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return
    if not cells:
        sys.exit(f"--only {' '.join(options.only)}: matches no cell, --list names them")
    out = options.out or (HOME / "quick" if options.quick else RESULTS)
    conditions = {
        **versions(),
        "device": device,
        "actors": options.actors,
        "cohort-size": options.cohort_size,
    }
    todo = [c for c in cells if options.again or not measured(out, c, conditions)]
    if todo:
        prepare(todo, device)
    failed = [cell.name for cell in todo if not run(cell, out, conditions)]
    if options.again or not read(out / "engine" / f"{MICRO}.json", conditions):
        failed += [] if micro(out, conditions, quick=options.quick) else [MICRO]
    print(write(out, conditions))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="cells by name, * and ?")
    parser.add_argument("--rounds", type=int, default=0, help="of every run; 0 means each cell's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--actors", type=int, default=2, help="client processes of fedlora, one thread each")
    parser.add_argument("--cohort-size", type=int, default=0, help="0: what fedlora chooses")
    parser.add_argument("--again", action="store_true", help="measure finished cells anew")
    parser.add_argument("--quick", action="store_true", help="two rounds of one step: does everything run?")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--out", type=Path, help="where figures go")
    options = parser.parse_args()
    if options.rounds < 0 or options.rounds == 1 or options.actors < 1 or options.cohort_size < 0:
        parser.error("--rounds must be 0 or >= 2, --actors >= 1, --cohort-size >= 0")
    return options


def versions() -> dict[str, Any]:
    """What decides whether figures may stand beside each other: packages, and a digest of the code."""
    code = source_digest(ROOT, (*top_packages(), "experiments/benchmarks"))
    return {"code": code, "packages": {name: version(name) for name in PACKAGES}}


def read(file: Path, conditions: dict[str, Any]) -> dict[str, Any] | None:
    """A finished record, if it was made under these conditions."""
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return record if record.get("conditions") == conditions else None


def measured(out: Path, cell: Cell, conditions: dict[str, Any]) -> bool:
    """Whether the cell's figures are there."""
    record = read(out / "engine" / f"{cell.name}.json", conditions)
    return record is not None and record["rounds"] == cell.rounds


def prepare(cells: list[Cell], device: str) -> None:
    """Texts, prepared data and initial adapters of all regimes, in a process that then ends."""
    regimes = list(dict.fromkeys(cell.regime for cell in cells))
    fields = json.dumps([dataclasses.asdict(regime) for regime in regimes])
    subprocess.run([sys.executable, "-m", "experiments.benchmarks.engine_data", fields, device], check=True)


def run(cell: Cell, out: Path, conditions: dict[str, Any]) -> bool:
    """One cell in a process of its own; False and a line on stderr where it failed."""
    folder = HOME / "cells" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    order = {
        "regime": cell.regime.name,
        "way": cell.way,
        "rounds": cell.rounds,
        "device": conditions["device"],
        "actors": conditions["actors"],
        "cohort_size": conditions["cohort-size"],
        "folder": str(folder / "run"),
    }
    command = [sys.executable, "-m", "experiments.benchmarks.engine_cell", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{cell.name}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}", file=sys.stderr)
        return False
    record = {
        "regime": dataclasses.asdict(cell.regime),
        "way": cell.way,
        "turn": cell.turn,
        "rounds": cell.rounds,
        "cohort_size": cohort_size(cell, folder / "run"),
        **json.loads(done.stdout),
        **probe(cell.regime.name, folder / "run"),
        "hardware": machine(conditions["device"]),
        "conditions": conditions,
    }
    keep(out, cell.name, record)
    seconds = f"{record['steady_seconds']:7.2f} s a round, {record['whole_seconds']:7.1f} s in all"
    print(f"{cell.name:48} {seconds}", file=sys.stderr, flush=True)
    write(out, conditions)
    return True


def cohort_size(cell: Cell, out: Path) -> int:
    """What fedlora took, which it writes down; 1 for the other ways."""
    return read_config(out / "config.toml").engine.cohort_size if cell.way == COHORT else 1


def micro(out: Path, conditions: dict[str, Any], *, quick: bool) -> bool:
    """`experiments.benchmarks.engine_micro` in a process of its own."""
    options = ["--device", conditions["device"], *(["--turns", "2"] if quick else [])]
    command = [sys.executable, "-m", "experiments.benchmarks.engine_micro", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{MICRO}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}", file=sys.stderr)
        return False
    record = json.loads(done.stdout)
    keep(out, MICRO, {**record, "hardware": machine(conditions["device"]), "conditions": conditions})
    return True


def machine(device: str) -> dict[str, object]:
    """`hardware`, and the accelerator where there is one."""
    found = hardware()
    return found | {"gpu": torch.cuda.get_device_name()} if device == "cuda" else found


def keep(out: Path, name: str, record: dict[str, Any]) -> None:
    """Write one cell's figures."""
    file = out / "engine" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record) + "\n")


def write(out: Path, conditions: dict[str, Any]) -> str:
    """Table and chart of all figures that were made under these conditions."""
    found = (read(file, conditions) for file in sorted((out / "engine").glob("*.json")))
    figures = Figures([record for record in found if record is not None])
    text = table(figures)
    out.mkdir(parents=True, exist_ok=True)
    (out / "engine.md").write_text(text)
    (out / "engine.svg").write_text(draw(figures))
    return text


if __name__ == "__main__":
    main()
