"""``fedlora compare``: every cell of a study on one engine, then the report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.checks import check
from fedlora.config import RunConfig, read_config, to_flat
from fedlora.engines.cluster import check_address
from fedlora.engines.cohorts import with_cohort_size
from fedlora.engines.ray_pool import RayPool
from fedlora.engines.simulate import quiet, simulate_on, start
from fedlora.errors import ConfigError
from fedlora.runs import RunDirectory
from fedlora.study.cells import Cell, expand
from fedlora.study.comparisons import declared
from fedlora.study.report import write_report
from fedlora.study.results import load_results

console = Console(stderr=True, soft_wrap=True)


def run_study(config: RunConfig, path: Path, *, resume: bool = False) -> Path:
    """Run what is not finished yet, one cell after the other on one engine; the report's path.

    Raises:
        ConfigError: a cell that cannot work, or a directory that is in use.
        RunFailed: a cell failed; the finished ones stay and are not run again with ``resume``.
    """
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise ConfigError(f"--out {path}: is not empty (use --resume to go on, or another directory)")
    quiet()
    check(config)
    check_address(config.engine.address)
    began = time.monotonic()
    pool = start(config)
    try:
        cells = expand(config, pool.lender(config).worker.data.num_partitions)
        declared(config.study.comparisons, {c.method: None for c in cells if c.kind != "reference"})
        for cell in cells:
            check(cell.config)
        results = [
            run_cell(pool, cell, path / cell.label, f"[{number}/{len(cells)}] {cell.label}")
            for number, cell in enumerate(cells, start=1)
        ]
    finally:
        pool.close()
    report = path / "report.html"
    title = config.study.title or path.name
    write_report(report, title, load_results(cells, path), config.study.comparisons)
    peak = max(result["peak_memory_bytes"] for result in results) / 2**30
    console.print(
        f"{len(cells)} runs, {time.monotonic() - began:.0f} s, peak memory {peak:.2f} GiB", highlight=False
    )
    return report


def run_cell(pool: RayPool, cell: Cell, path: Path, title: str) -> dict[str, Any]:
    """The result record of one cell; one that is finished under the same configuration is only read."""
    finished = path / "result.json"
    if finished.exists():
        asked = with_cohort_size(cell.config, path)
        if to_flat(read_config(path / "config.toml")) == to_flat(asked):
            result: dict[str, Any] = json.loads(finished.read_text())
            return result
    return simulate_on(pool, cell.config, RunDirectory(path, resume=True), title)
