"""Tables and chart of `time.toml`: ``python -m experiments.waiting`` writes ``docs/time.svg``.

Time to accuracy of each way of waiting against waiting for all, seed by seed: the exact sign test, in which a
run that fails or never gets there is later than any that does, and seeds where neither does do not count. And
what staleness costs in accuracy after as many updates, by the exact sign-flip test. Holm within each of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from statistics import median

from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import binomtest

from experiments.marked import markdown
from fedlora.core.files import write_atomic
from fedlora.study.analyse.curves import score_over, simulated
from fedlora.study.analyse.sign_flip import sign_flip
from fedlora.study.analyse.summary import Row, reached
from fedlora.study.report.figure import SETTINGS
from fedlora.study.report.styles import HUES, PAPER

TARGET = 0.65
ALL, STALE = "all", "buffered-20"
COMPARED = ("deadline", "over", "buffered")
Reached = dict[int, tuple[float, float]]
"""Seed -> simulated seconds and megabytes until the target; infinite where it is never reached."""


def until(row: Row, seeds: Iterable[int]) -> Reached:
    """When each seed of a row has the target; a run that failed never does."""
    found: Reached = dict.fromkeys(seeds, (math.inf, math.inf))
    for result in row.results:
        seconds, sent = reached(result, TARGET) or (math.inf, math.inf)
        found[result.seed] = (math.inf if seconds is None else seconds), sent / 1e6
    return found


def ahead(mine: Reached, theirs: Reached) -> tuple[int, int]:
    """On how many seeds the first is sooner, of how many on which the two differ."""
    pairs = [(mine[seed][0], theirs[seed][0]) for seed in mine]
    return sum(a < b for a, b in pairs), sum(a != b for a, b in pairs)


def sign_test(wins: int, count: int) -> float:
    """Two-sided p-value of the exact sign test.

    >>> sign_test(10, 10), sign_test(0, 0)
    (0.001953125, 1.0)
    """
    return float(binomtest(wins, count).pvalue) if count else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the given order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, least = [0.0] * len(values), 0.0
    for done, place in enumerate(order):
        least = corrected[place] = max(least, min(1.0, (len(values) - done) * values[place]))
    return corrected


def times_table(rows: Sequence[Row]) -> str:
    """A line for each rule and way of waiting."""
    seeds = sorted({seed for row in rows for seed in row.seeds})
    found = {row.method: until(row, seeds) for row in rows}
    tested = {
        name: ahead(times, found[f"{rule}-{ALL}"])
        for name, times in found.items()
        for rule, _, way in [name.partition("-")]
        if way in COMPARED
    }
    corrected = dict(zip(tested, holm([sign_test(*counts) for counts in tested.values()]), strict=True))
    lines = []
    for name, times in found.items():
        there = [seconds for seconds, _ in times.values() if seconds < math.inf]
        line = [
            f"`{name}`",
            f"{len(there)} of {len(times)}",
            *map(_middle, zip(*times.values(), strict=True)),
        ]
        if name in tested:
            wins, count = tested[name]
            line += [f"{wins} of {count}", f"{sign_test(wins, count):.3f}", f"{corrected[name]:.3f}"]
        lines.append(line + [""] * (7 - len(line)))
    header = ["", f"reach {TARGET:.0%}", "seconds, median", "MB, median", "sooner than `-all`", "p", "Holm p"]
    return markdown(header, lines)


def staleness_table(rows: Sequence[Row]) -> str:
    """What 20 at work cost in accuracy after as many updates, for averages of factors and for exact sums."""
    accuracy = {row.method: row.score_by_seed for row in rows}
    seeds = sorted(
        set.intersection(*(set(accuracy[f"{r}-{w}"]) for r in ("fedavg", "flora") for w in (ALL, STALE)))
    )
    cost = {
        rule: [accuracy[f"{rule}-{ALL}"][s] - accuracy[f"{rule}-{STALE}"][s] for s in seeds]
        for rule in ("fedavg", "flora")
    }
    cost["fedavg more than flora"] = [a - b for a, b in zip(cost["fedavg"], cost["flora"], strict=True)]
    p_values = [sign_flip(values) for values in cost.values()]
    lines = [
        [name, f"{100 * sum(values) / len(values):+.1f}", f"{sum(v > 0 for v in values)} of {len(values)}",
         f"{p:.3f}", f"{q:.3f}"]
        for (name, values), p, q in zip(cost.items(), p_values, holm(p_values), strict=True)
    ]  # fmt: skip
    return markdown(["loses by 20 at work", "points", "on", "p", "Holm p"], lines)


def draw(rows: Sequence[Row]) -> str:
    """An SVG: accuracy over simulated seconds, a panel for each rule."""
    by_name = {row.method: row for row in rows}
    rules = list(dict.fromkeys(name.partition("-")[0] for name in by_name))
    ways = (ALL, *COMPARED)
    with rc_context(SETTINGS):
        canvas = Figure(figsize=(11, 3.2), layout="constrained")
        for panel, rule in zip(canvas.subplots(1, len(rules), sharey=True), rules, strict=True):
            for way, hue in zip(ways, HUES, strict=False):
                row = by_name.get(f"{rule}-{way}")
                curve = None if row is None else score_over(row, simulated(row))
                if curve is not None:
                    panel.plot([3600 * x for x in curve.x], [100 * y for y in curve.y], color=hue, label=way)
            panel.axhline(100 * TARGET, color="black", linewidth=0.8, linestyle=":")
            panel.set_title(rule, loc="left", fontsize=12)
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        canvas.supxlabel("simulated seconds, mean over seeds", fontsize=11)
        canvas.axes[0].set_ylabel("accuracy in percent")
        canvas.axes[0].legend(frameon=False, fontsize=9)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None}, facecolor=PAPER)
    return buffer.getvalue()


def _middle(values: Sequence[float]) -> str:
    middle = median(values)
    return "never" if middle == math.inf else f"{middle:.3g}"


def main() -> None:
    """Draw the chart of what is kept."""
    from experiments.tables import HERE, kept

    write_atomic(HERE.parent / "docs" / "time.svg", draw(kept("time").rows))


if __name__ == "__main__":
    main()
