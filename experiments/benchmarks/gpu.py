"""What a device makes of local training: fedlora's steps beside a bare loop and the frozen model alone.

    python -m experiments.benchmarks.gpu [--models minilm,roberta-large,llama-1b,llama-3b,llama-8b] \
        [--precisions float32,bfloat16] [--cohorts 1,4,16,64] [--batch-size 4] [--tokens 128] \
        [--seconds 440] [--device auto] [--out experiments/benchmarks/results/gpu]

Models are made at random on the device, nothing is fetched. In a cell (cohort, model, precision) the ways see
as many tokens: the base's forward and backward without adapters; clients together, with and without DP-SGD.
In the cells of cohort 1 also PEFT's LoRA with AdamW in a plain loop, and clients one by one. A step is what
two steps more cost. Small cohorts of all models come first; when the seconds are used up the rest is left
out, and what does not fit into memory is a line, too. OUT.json and OUT.md are written after each line.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks.engine_micro import timed
from experiments.benchmarks.gpu_ways import ALONE, FROZEN, MODELS, RANK, WAYS, Bench
from experiments.benchmarks.hardware import hardware
from fedlora.errors import ConfigError
from fedlora.models import pick_device

SHORT, LONG = 1, 3
"""Steps of the two trainings of which the difference is taken."""
PEAKS = {
    "A100": (19.5, 312.0), "H100 80GB": (67.0, 989.0), "H200": (67.0, 989.0), "L4": (30.3, 121.0),
    "L40S": (91.6, 362.0), "RTX 4090": (82.6, 165.0),
}  # fmt: skip
"""TFLOP/s of float32 and of bfloat16 without sparsity, by data sheets, by part of a card's name."""


@dataclass(slots=True, kw_only=True)
class Row:
    """One way in one cell.

    Attributes:
        tokens_per_second: of all clients together; None where there is none, and ``why`` says why.
        of_frozen: its tokens a second relative to those of the frozen model.
        of_peak: the frozen model's floating point operations at that speed, relative to the card's peak.
        peak_gib: of the device's memory while it ran.
    """

    model: str
    precision: str
    cohort: int
    way: str
    tokens_per_second: float | None = None
    of_frozen: float | None = None
    of_peak: float | None = None
    peak_gib: float | None = None
    why: str = ""


@dataclass(slots=True, kw_only=True)
class Table:
    """All rows so far, and where they are kept."""

    out: Path
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Print, keep and write it."""
        self.rows.append(row)
        print(_line(row), flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        record = {**self.about, "rows": [asdict(r) for r in self.rows]}
        self.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        head = [
            "| model | precision | cohort | way | tokens/s | of frozen | of peak | GiB | |",
            "|" + "---|" * 9,
        ]
        table = "\n".join([*head, *(f"| {_line(r, ' | ')} |" for r in self.rows)])
        shown = "\n".join(f"- {key}: {value}" for key, value in self.about.items())
        self.out.with_suffix(".md").write_text(f"# Local training on a device\n\n{shown}\n\n{table}\n")


def _line(row: Row, between: str = "  ") -> str:
    numbers = [
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        *("-" if share is None else f"{share:.3f}" for share in (row.of_frozen, row.of_peak)),
        "-" if row.peak_gib is None else f"{row.peak_gib:.2f}",
    ]
    return between.join([row.model, row.precision, str(row.cohort), row.way, *numbers, row.why])


def measure(options: argparse.Namespace, device: torch.device) -> Table:
    """All cells, until the seconds are used up."""
    began = time.monotonic()
    table = Table(out=options.out, about=_about(options, device))
    for cohort, name, precision in product(options.cohorts, options.models, options.precisions):
        frozen = None
        for way in WAYS if cohort == 1 else [way for way in WAYS if way not in ALONE]:
            row = Row(model=name, precision=precision, cohort=cohort, way=way)
            if time.monotonic() - began > options.seconds:
                row.why = f"left out: the {options.seconds} seconds are used up"
            elif precision == "bfloat16" and "private" in way:
                row.why = "refused in bfloat16"
            else:
                _fill(row, options, device, frozen)
            if way == FROZEN:
                frozen = row
            table.add(row)
    return table


def _fill(row: Row, options: argparse.Namespace, device: torch.device, frozen: Row | None) -> None:
    """Measure a way; where memory runs out the row says so."""
    _forget(device)
    try:
        bench = Bench(row.model, row.precision, options, device)
        train = WAYS[row.way](bench, row.cohort)
        train(SHORT)
        taken = []
        for _ in range(options.turns):
            short = timed(lambda: train(SHORT), device)
            taken.append((timed(lambda: train(LONG), device) - short) / (LONG - SHORT))
        seconds = float(np.median(taken))
        if seconds <= 0:
            row.why = "not measured: two steps more took no longer"
            return
        row.tokens_per_second = row.cohort * options.batch_size * options.tokens / seconds
        if device.type == "cuda":
            row.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        if row.way == FROZEN:
            row.of_frozen = 1.0
            peak = peak_of(device, row.precision)
            if peak is not None:
                with FlopCounterMode(display=False) as counter:
                    train(1)
                row.of_peak = counter.get_total_flops() / seconds / peak
        elif frozen is not None and frozen.tokens_per_second:
            row.of_frozen = row.tokens_per_second / frozen.tokens_per_second
            row.of_peak = None if frozen.of_peak is None else frozen.of_peak * row.of_frozen
    except (torch.OutOfMemoryError, MemoryError):
        row.why = "out of memory"
    except RuntimeError as error:  # what a CPU says
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        row.why = "out of memory"


def _forget(device: torch.device) -> None:
    """Let the last model go."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_of(device: torch.device, precision: str) -> float | None:
    """Floating point operations a second of the card at most; None where it is not in `PEAKS`."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    found = [PEAKS[part] for part in sorted(PEAKS, key=len) if part in name]
    return 1e12 * found[-1][precision == "bfloat16"] if found else None


def _about(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What was measured, on what."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    shape = {"batch-size": options.batch_size, "tokens": options.tokens, "rank": RANK, "turns": options.turns}
    return {"device": card, **shape, **hardware()}


def main() -> None:
    """Measure; the table is printed as it grows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=_names, default=[m for m in MODELS if not m.startswith("tiny")])
    parser.add_argument("--precisions", type=_names, default=["float32", "bfloat16"])
    parser.add_argument("--cohorts", type=_names, default=["1", "4", "16", "64"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=440, help="after so many no way is begun")
    parser.add_argument("--device", default="auto", help="as engine.device")
    parser.add_argument("--out", type=Path, default=Path("experiments/benchmarks/results/gpu"))
    options = parser.parse_args()
    for flag, accepted in (("models", list(MODELS)), ("precisions", ["float32", "bfloat16"])):
        if wrong := [name for name in getattr(options, flag) if name not in accepted]:
            parser.error(f"--{flag} {wrong[0]}: accepted are {', '.join(accepted)}")
    if wrong := [size for size in options.cohorts if not size.isdecimal() or size == "0"]:
        parser.error(f"--cohorts {wrong[0]}: must be sizes >= 1")
    options.cohorts = [int(size) for size in options.cohorts]
    if min(options.batch_size, options.turns) < 1 or options.tokens < 2 or options.seconds <= 0:
        parser.error("--batch-size and --turns must be >= 1, --tokens >= 2, --seconds > 0")
    try:
        measure(options, pick_device(options.device))
    except ConfigError as error:
        parser.error(str(error))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


if __name__ == "__main__":
    main()
