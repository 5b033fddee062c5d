from __future__ import annotations

from experiments.benchmarks.engine_cells import (
    COHORT,
    DEFAULT,
    LOOP,
    ONE,
    ONE_ACTOR,
    OVERHEAD,
    PRIVATE,
    REFERENCE,
    STOCK,
    Block,
    Regime,
    chosen_cells,
)


def test_ways_take_turns_and_every_second_turn_goes_backwards() -> None:
    block = Block(regime=REFERENCE, ways=(LOOP, ONE, COHORT), rounds=3, turns=2)
    assert [cell.way for cell in block.cells()] == [LOOP, ONE, COHORT, COHORT, ONE, LOOP]


def test_a_regime_and_its_private_twin_have_names_of_their_own() -> None:
    regimes = [REFERENCE, PRIVATE, Regime(text="real"), Regime(population=1000), Regime(batch_size=8)]
    assert len({regime.name for regime in regimes}) == len(regimes)


def test_the_default_compares_everything_with_the_stock_app_in_the_reference_regime() -> None:
    names = {cell.name for cell in chosen_cells([], 0, quick=False)}
    for regime in (REFERENCE, PRIVATE):
        assert {f"{regime.name}.{way}.1" for way in (LOOP, STOCK, ONE, COHORT)} <= names
    assert len(names) == sum(len(block.ways) * block.turns for block in DEFAULT)


def test_patterns_reach_what_is_not_run_by_default() -> None:
    wanted = "real-64of10000-5x16-dp.cohort.1"
    assert wanted not in {cell.name for cell in chosen_cells([], 0, quick=False)}
    assert [cell.name for cell in chosen_cells([wanted], 3, quick=False)] == [wanted]
    assert chosen_cells([wanted], 3, quick=False)[0].rounds == 3
    assert chosen_cells(["nothing.like.this"], 0, quick=False) == []


def test_a_pattern_finds_all_turns_of_a_default_cell_and_leaves_it_its_rounds() -> None:
    found = chosen_cells([f"{OVERHEAD.name}.{ONE_ACTOR}.*", "fixed-16of16-5x8.cohort.*"], 0, quick=False)
    assert sorted((cell.way, cell.turn, cell.rounds) for cell in found) == [
        (COHORT, 1, 4),
        (ONE_ACTOR, 1, 4),
        (ONE_ACTOR, 2, 4),
    ]


def test_quick_is_one_turn_of_two_rounds_of_one_step() -> None:
    cells = chosen_cells([], 0, quick=True)
    assert {(cell.rounds, cell.turn, cell.regime.local_steps) for cell in cells} == {(2, 1, 1)}
    assert {cell.way for cell in cells} >= {LOOP, STOCK, ONE, COHORT}
