"""What `experiments.benchmarks.engine` measures: regimes, the ways to run them, and which by default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

HOME = Path("runs/benchmarks/engine")
"""Where the runs and what they are given lie; only figures are kept elsewhere."""
LOOP, LOOP_ALL = "loop-1-thread", "loop-all-threads"
STOCK, STOCK_SIMULATION = "stock", "stock-run-simulation"
ONE, COHORT, ONE_ACTOR = "one-by-one", "cohort", "one-by-one-1-actor"
WAYS = {
    LOOP: "PyTorch loop, 1 thread",
    LOOP_ALL: "PyTorch loop, all threads",
    STOCK: "stock Flower app, `flwr run`",
    STOCK_SIMULATION: "stock Flower app, `run_simulation`",
    ONE: "fedlora, one by one",
    COHORT: "fedlora, cohorts",
    ONE_ACTOR: "fedlora, one by one, 1 actor",
}
"""The ways to run a regime, with their names for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """What is trained; the defaults are the reference regime.

    Attributes:
        sampled: clients of one round.
        population: clients that exist.
        batch_size: examples a step (under DP the expected number).
        local_steps: steps of a client.
        text: ``fixed``: 32 tokens each; ``real``: sentences as they are, at most 64 tokens.
        private: DP-SGD at each client.
    """

    sampled: int = 16
    population: int = 16
    batch_size: int = 4
    local_steps: int = 5
    text: str = "fixed"
    private: bool = False

    @property
    def name(self) -> str:
        """``fixed-16of16-5x4``: text, clients, steps x batch size, and ``-dp``."""
        work = f"{self.local_steps}x{self.batch_size}"
        return f"{self.text}-{self.sampled}of{self.population}-{work}{'-dp' if self.private else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of one regime, in processes of its own.

    Attributes:
        regime: what is trained.
        way: how, a key of `WAYS`.
        rounds: of the run.
        turn: counts repetitions from 1.
    """

    regime: Regime
    way: str
    rounds: int
    turn: int = 1

    @property
    def name(self) -> str:
        return f"{self.regime.name}.{self.way}.{self.turn}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Ways that are compared: they take turns, every second turn in reverse order."""

    regime: Regime
    ways: tuple[str, ...]
    rounds: int
    turns: int = 1

    def cells(self) -> Iterator[Cell]:
        """The runs in their order."""
        for turn in range(1, self.turns + 1):
            for way in self.ways if turn % 2 else self.ways[::-1]:
                yield Cell(regime=self.regime, way=way, rounds=self.rounds, turn=turn)


REFERENCE = Regime()
PRIVATE = Regime(private=True)
OVERHEAD = Regime(sampled=4, local_steps=30)
"""A client works for more than 2 s: what the engine itself costs beside a loop on the same one core."""
PAIR = (ONE, COHORT)

DEFAULT = (
    Block(regime=REFERENCE, ways=(LOOP, LOOP_ALL, STOCK, ONE, COHORT), rounds=10, turns=2),
    Block(regime=PRIVATE, ways=(LOOP, STOCK, ONE, COHORT), rounds=10),
    Block(regime=REFERENCE, ways=(STOCK_SIMULATION,), rounds=10),
    Block(regime=OVERHEAD, ways=(LOOP, ONE_ACTOR), rounds=4, turns=2),
    Block(regime=Regime(batch_size=8), ways=PAIR, rounds=4),
    Block(regime=Regime(batch_size=16), ways=PAIR, rounds=4),
    Block(regime=Regime(population=1000), ways=(COHORT,), rounds=5),
    Block(regime=Regime(population=10_000), ways=(COHORT,), rounds=5),
    Block(regime=Regime(sampled=4, population=1000), ways=PAIR, rounds=5),
    Block(regime=Regime(sampled=64, population=1000), ways=PAIR, rounds=3),
    Block(regime=Regime(text="real"), ways=(LOOP, ONE, COHORT), rounds=4),
)
"""What runs unless cells are named."""


def every_block(rounds: int) -> Iterator[Block]:
    """Every regime that is asked about, in all ways."""
    for text in ("fixed", "real"):
        for population in (16, 1000, 10_000):
            for sampled in (4, 16, 64):
                for batch_size in (4, 8, 16):
                    for private in (False, True):
                        regime = Regime(
                            sampled=sampled, population=population, batch_size=batch_size, text=text,
                            private=private,
                        )  # fmt: skip
                        if sampled <= population:
                            yield Block(regime=regime, ways=tuple(WAYS), rounds=rounds)


def chosen_cells(patterns: list[str], rounds: int, *, quick: bool) -> list[Cell]:
    """The cells to run: the default ones, or all whose name matches a pattern.

    Args:
        patterns: of `fnmatch`, over names such as ``fixed-16of16-5x4.cohort.1``; none means the default.
        rounds: of every cell; 0 leaves the default ones theirs and gives the others 10.
        quick: one turn of two rounds of one step, to see that it runs.

    Returns:
        Each cell once; where a pattern finds one of the default cells, all of its turns.
    """
    found = {cell.name: cell for block in DEFAULT for cell in block.cells()}
    if patterns:
        more = {cell.name: cell for block in every_block(10) for cell in block.cells()}
        wanted = {**more, **found}
        found = {n: c for n, c in wanted.items() if any(fnmatch(n, pattern) for pattern in patterns)}
    cells = [replace(cell, rounds=rounds) if rounds else cell for cell in found.values()]
    if not quick:
        return cells
    return [
        replace(cell, rounds=2, regime=replace(cell.regime, local_steps=1))
        for cell in cells
        if cell.turn == 1
    ]
