"""Chart of who was at work when, in simulated time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedlora.study.analyse.summary import Row
from fedlora.study.report.figure import HEIGHT, Canvas, Chart, Numbers, series_gid
from fedlora.study.report.format import duration
from fedlora.study.report.round_charts import Styles
from fedlora.study.report.styles import RULE

ROUNDS, CLIENTS, METHODS = 5, 6, 8
"""How many are shown: rounds from the first one on, clients by their numbers, and runs."""
LINE = 11
"""Height of a client's line, in SVG units."""


class Spell(NamedTuple):
    """A client at work, in seconds since the start; ``taken`` says whether its reply was."""

    partition: int
    asked: float
    ended: float
    taken: bool


def timeline_chart(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """Clients at work over simulated time, for the first seed of each run."""
    shown = [row for row in rows if row.kind != "reference" and spells(row.results[0].rounds)][:METHODS]
    if not shown:
        return None
    clients = {row.name: _clients(row.results[0].rounds) for row in shown}
    canvas, body = Canvas(max(HEIGHT, 46 + LINE * sum(len(c) + 1 for c in clients.values()))), []
    for place, row in enumerate(shown):
        records, style, mine = row.results[0].rounds[:ROUNDS], styles[row.name], clients[row.name]
        ends = [record["virtual_seconds"] for record in records]
        canvas.axes.vlines(ends, place - 0.45, place + 0.45, color=RULE, linewidth=1.0)
        height = {p: place + 0.9 * ((i + 1) / (len(mine) + 1) - 0.5) for i, p in enumerate(mine)}
        work = [spell for spell in spells(records) if spell.partition in height]
        for taken, look in ((True, {"linewidth": 4.0}), (False, {"linewidth": 1.2, "linestyle": ":"})):
            some = [spell for spell in work if spell.taken == taken]
            canvas.axes.hlines(
                [height[s.partition] for s in some], [s.asked for s in some], [s.ended for s in some],
                color=style.colour, gid=series_gid(style.key, f"work-{taken}"), **look,
            )  # fmt: skip
        told = [s for s in work if s.taken]
        notes = [
            f"{row.name}, client {s.partition}: {duration(s.asked)} to {duration(s.ended)}" for s in told
        ]
        if told:
            canvas.points([(s.ended, height[s.partition]) for s in told], style, notes)
        body.append((row.name, *(duration(ends[n]) if n < len(ends) else "" for n in range(ROUNDS))))
    canvas.group_axis([row.name for row in shown])
    canvas.axes.set_xlim(left=0)
    canvas.axes.xaxis.set_major_locator(MaxNLocator(4))
    canvas.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    canvas.axes.set_xlabel("simulated time")
    return Chart(
        name="timeline",
        title="Who was at work when",
        note=f"The first {ROUNDS} rounds of each run's first seed, and of its clients the {CLIENTS} with the "
        "lowest numbers among those asked. A bar is a client's work from the order to its reply; dotted is "
        "work whose reply was not taken; upright lines are aggregations.",
        svg=canvas.finish("timeline", "Bars of clients at work over simulated time, by run"),
        figure=canvas.figure,
        numbers=Numbers(("run", *(f"round {n + 1} ends" for n in range(ROUNDS))), tuple(body)),
    )


def spells(records: Sequence[dict[str, Any]]) -> list[Spell]:
    """The work of all clients whose orders a record tells; a reply that is not taken ends with its round."""
    found = []
    for record in records:
        arrivals = record.get("arrivals", {})
        for partition, asked in record.get("orders", {}).items():
            ended = arrivals.get(partition, record["virtual_seconds"])
            found.append(Spell(int(partition), asked, ended, partition in arrivals))
    return found


def _clients(records: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({spell.partition for spell in spells(records[:ROUNDS])})[:CLIENTS]
