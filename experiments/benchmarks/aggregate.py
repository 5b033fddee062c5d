"""Every method's server step at LLaMA-7B shapes: seconds, peak memory, and the naive dense way beside it.

    python -m experiments.benchmarks.aggregate [--quick] [--out DIR] [--rules A,B] [--settings A,B]

Each figure comes from a process of its own. Updates are random; what is timed is `Rule.aggregate` (a stack
of SVDs, QRs and means on all cores), without and with the round's diagnostics. Peak memory is the largest
resident set minus that of the interpreter with its imports, over the bytes of the clients' factors (which
are in it). With ``--rules`` or ``--settings`` the other figures stay as they are, and the new ones say on
what they were measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks.hardware import hardware
from experiments.benchmarks.naive import NAIVE

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "llama-7b": {"modules": 64, "size": 4096, "clients": 10, "ranks": [16]},
    "mixed": {"modules": 64, "size": 4096, "clients": 10, "ranks": [4, 8, 16, 32, 64]},
    "10": {"modules": 4, "size": 4096, "clients": 10, "ranks": [16]},
    "100": {"modules": 4, "size": 4096, "clients": 100, "ranks": [16]},
    "1000": {"modules": 4, "size": 4096, "clients": 1000, "ranks": [16]},
}
QUICK = {"modules": 4, "size": 256, "clients": 10, "ranks": [4]}


def main() -> None:
    """All cells, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rules", default="", help="these alone, for instance fedask,galore")
    parser.add_argument("--settings", default="", help=f"these alone, of {', '.join(SHAPES)}")
    arguments = parser.parse_args()
    record: dict[str, Any] = {"hardware": hardware(), "shapes": SHAPES, "cells": {}}
    some = arguments.rules or arguments.settings
    if some:
        record = json.loads((arguments.out / "aggregate.json").read_text())
    for setting in chosen(arguments.settings, list(SHAPES)):
        shape = QUICK if arguments.quick else SHAPES[setting]
        for name in chosen(arguments.rules, methods(mixed=setting == "mixed")):
            kinds = [
                (setting, "step"),
                *([("naive", "naive")] if setting == "llama-7b" and name in NAIVE else []),
            ]
            for key, kind in kinds:
                measured = cell(kind, name, shape)
                if measured and some:
                    measured["hardware"] = hardware()
                record["cells"][f"{key}/{name}"] = measured
                text = written(arguments.out, record)
    print(text)


def chosen(names: str, able: list[str]) -> list[str]:
    """Those of the names, by commas, that are able; all of them without any."""
    return [name for name in able if name in names.split(",")] if names else able


def written(directory: Path, record: dict[str, Any]) -> str:
    """Write the figures so far, and return their table."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "aggregate.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(record)
    (directory / "aggregate.md").write_text(text)
    return text


def methods(*, mixed: bool) -> list[str]:
    """Names of the rules that have something to do on the server."""
    from strategies.registry import RULES

    return [n for n, r in RULES.items() if r.facts.uploaded and (r.facts.mixed_ranks or not mixed)]


def cell(kind: str, name: str, shape: dict[str, Any]) -> dict[str, Any] | None:
    """One figure from a process of its own; None and a line on stderr where it failed."""
    command = [sys.executable, "-m", "experiments.benchmarks.aggregate_cell", kind, name, json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{kind} {name} {shape}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    measured: dict[str, Any] = json.loads(done.stdout)
    print(f"{kind:6} {name:14} {shape['clients']:5} clients  {measured['seconds']:9.3f} s", file=sys.stderr)
    return measured


def table(record: dict[str, Any]) -> str:
    """The figures for people."""
    cells, hw = record["cells"], record["hardware"]
    lines = [
        "# Server step of every method",
        "",
        f"{hw['cpu']}, {hw['cores']} cores, torch {hw['torch']}, load at the end {hw['load_1min']}. "
        "LLaMA-7B shapes: 64 modules of 4096 x 4096, 10 clients of rank 16, float32, a process for each row. "
        "Memory is the peak above the interpreter's own, over the bytes of the clients' factors. Naive: the "
        "same equation with (out, in) matrices, measured on one module and multiplied by 64.",
        *(f"Measured later, {how}." for how in later(cells)),
        "",
        "| method | seconds | with diagnostics | memory | streamed | naive, extrapolated | ratio "
        "| ranks 4..64 | 10 | 100 | 1,000 clients (4 modules) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in methods(mixed=False):
        step, naive = cells.get(f"llama-7b/{name}"), cells.get(f"naive/{name}")
        columns = [f"`{name}`"]
        columns += [_number(step, "seconds"), _number(step, "seconds_with_diagnostics")]
        columns += [_number(step, "memory_ratio", "x"), _number(step, "streamed_memory_ratio", "x")]
        columns += [_number(naive, "seconds"), _ratio(naive, step)]
        columns += [
            _number(cells.get(f"{setting}/{name}"), "seconds") for setting in ("mixed", "10", "100", "1000")
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def later(cells: dict[str, Any]) -> list[str]:
    """Where and of which rules the figures are that were put in later."""
    found: dict[str, set[str]] = {}
    for key, measured in cells.items():
        if measured and "hardware" in measured:
            hw = measured["hardware"]
            found.setdefault(f"{hw['cpu']}, {hw['cores']} cores", set()).add(key.partition("/")[2])
    return [
        f"on {where}: {', '.join(f'`{name}`' for name in sorted(names))}" for where, names in found.items()
    ]


def _number(measured: dict[str, Any] | None, key: str, unit: str = "") -> str:
    if measured is None or measured.get(key) is None:
        return ""
    value = float(measured[key])
    return f"{value:,.0f}{unit}" if value >= 100 else f"{value:.2f}{unit}"


def _ratio(naive: dict[str, Any] | None, step: dict[str, Any] | None) -> str:
    return "" if naive is None or step is None else f"{naive['seconds'] / step['seconds']:,.0f}x"


if __name__ == "__main__":
    main()
