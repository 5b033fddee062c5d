"""The figures of `experiments.benchmarks.engine` for people, as Markdown."""

from __future__ import annotations

from statistics import median
from typing import Any

from experiments.benchmarks.engine_cells import COHORT, LOOP, WAYS, Regime
from experiments.benchmarks.engine_figures import FIRST, MEMORY, STEADY, WHOLE, Figures, targets

INTRODUCTION = (
    "Each run is processes of its own, started as a user starts them; all are watched from outside. A round "
    "is steady seconds: the median without the first round, which loads everything, and the last, which "
    "evaluates. Whole: from the command to its end. Memory: the largest sum of the proportional set sizes "
    "of all processes of a run. Logits: the largest difference on 64 test examples between the adapter at "
    "the end and that of the PyTorch loop on one thread (`=`: the adapters have the same bits). The stock "
    "app draws its own batches, so its adapter is another. Data was prepared before; the model is MiniLM "
    "with rank 8 on query and value and a trained head. A client has 32 examples, drawn with replacement "
    "from all; under privacy 32 of its own."
)


def table(figures: Figures) -> str:
    """All there is: targets, runs, and what one process does."""
    if not figures.records:
        return "# The engine\n\nNothing measured yet.\n"
    parts = ["# The engine", _machine(figures.records[0]), INTRODUCTION, "## Targets", _targets(figures)]
    if figures.micro is not None:
        parts += ["## One process, one thread", _micro(figures.micro)]
    for regime in figures.regimes():
        parts += [f"## {title(regime)}", _regime(figures, regime)]
    return "\n\n".join(parts) + "\n"


def title(regime: Regime) -> str:
    """A regime in words."""
    tokens = "32 tokens" if regime.text == "fixed" else "real sentences"
    return (
        f"{regime.sampled} of {regime.population:,} clients, {regime.local_steps} steps of "
        f"{regime.batch_size} x {tokens}{', private' if regime.private else ''}"
    )


def _machine(record: dict[str, Any]) -> str:
    hw, conditions = record["hardware"], record["conditions"]
    packages = ", ".join(f"{name} {version}" for name, version in conditions["packages"].items())
    where = hw.get("gpu") or hw["cpu"]
    return (
        f"{where}, {hw['cores']} cores, device {conditions['device']}, {conditions['actors']} client "
        f"processes in fedlora; Python {hw['python']}, {packages}."
    )


def _targets(figures: Figures) -> str:
    lines = ["| what | target | measured | reached |", "|---|---|---|---|"]
    for target in targets(figures):
        sign = ">=" if target.least else "<="
        value = "" if target.value is None else f"{target.value:.3g}"
        lines.append(f"| {target.text} | {sign} {target.bound:g} | {value} | {target.verdict} |")
    return "\n".join(lines)


def _regime(figures: Figures, regime: Regime) -> str:
    lines = [
        "| way | runs | rounds | s a round | s to the end of round 1 | s in all | clients a minute "
        "| peak memory, MB | logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in figures.ways(regime):
        runs = figures.turns(regime, way)
        rate = 60 * regime.sampled / median(run[STEADY] for run in runs)
        name = f"{WAYS[way]} of {runs[0]['cohort_size']}" if way == COHORT else WAYS[way]
        columns = [name, str(len(runs)), str(runs[0]["rounds"])]
        columns += [_spread([run[key] for run in runs]) for key in (STEADY, FIRST, WHOLE)]
        columns += [f"{rate:,.0f}", f"{median(run[MEMORY] for run in runs) / 1e6:,.0f}"]
        lines.append(f"| {' | '.join([*columns, _logits(figures, regime, way)])} |")
    return "\n".join(lines)


def _logits(figures: Figures, regime: Regime, way: str) -> str:
    difference = figures.logits_apart(regime, way)
    if difference is None:
        return ""
    if way == LOOP or figures.same_bits(regime, way):
        return "="
    return f"{difference:.1e}"


def _spread(values: list[float]) -> str:
    """The median, and the range where there were several runs."""
    middle = f"{median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f} to {max(values):.2f})"


def _micro(micro: dict[str, Any]) -> str:
    lines = [
        f"{micro['cohort_size']} clients, each {micro['batch_size']} x {micro['tokens']} tokens; medians "
        f"over {micro['turns']} turns in which all take their turn. The machine's matmul rate is "
        f"{micro['matmul_gflops']:,.0f} GFLOP/s (float32, {micro['matmul']}); the frozen model's forward "
        f"and backward does {micro['frozen_gflops']:,.0f}, a share of "
        f"{100 * micro['frozen_of_matmul']:.0f} %, the cohort's step, counted as the same work, "
        f"{100 * micro['cohort_of_matmul']:.0f} %.",
        "",
        "| what | tokens a second | of the frozen model's rate |",
        "|---|---|---|",
    ]
    for name, row in micro["rows"].items():
        lines.append(f"| {name} | {row['tokens_per_second']:,.0f} | {100 * row['of_frozen']:.0f} % |")
    return "\n".join(lines)
