"""Rules of mean products under secure sums: sketches of products are what is added up."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.secure import _sketched
from fedlora import wire
from fedlora.core.factors import LoraFactors
from fedlora.errors import RunFailed, SecureRefused
from fedlora.secure.step import Step
from fedlora.server.preview import preview
from fedlora.server.secure import secure_line
from strategies.registry import RULES
from tests.federation.secured import VALUES, carry_out, config_of, distance, first_vanish, phase

MIXED: dict[str, Any] = {
    "lora.ranks": "1,2", "client-groups": '[{"partitions": "1", "alpha": 3.0}]', "engine.cohort-size": 1,
    "secure.min-clients": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["flexlora", "fedask", "fedmomentum"])
def test_clients_of_any_rank_and_alpha_add_up_their_products(name: str, cache: Path, tmp_path: Path) -> None:
    """As without secure sums; what sums tell of the aggregation is what is measured there, too."""
    keys = {**MIXED, "strategy.name": name}
    plain, _ = carry_out(tmp_path / "plain", **{**keys, "secure.mode": "none"})
    summed, _ = carry_out(tmp_path / "sums", **keys)
    assert distance(summed.state, plain.state) < 1e-4
    for line, other in zip(summed.directory.rounds(), plain.directory.rounds(), strict=True):
        for key in ("gap", "update_norm", "effective_rank", "energy_lost"):
            assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6)
        assert "cosine" not in line
        assert line["sketch_lost"] == 0
        assert "sketch_lost" not in other


def test_a_sum_in_which_too_few_are_left_of_a_rank_is_not_unmasked(cache: Path, tmp_path: Path) -> None:
    """Three of five have rank 2; without one of them the others' columns would be theirs alone."""
    keys = {"strategy.name": "flexlora", "lora.ranks": "2,2,2,1,1", "num-server-rounds": 1}
    carry_out(tmp_path / "whole", **keys)

    def losing(message: Message, partition: int, reply: Message) -> Message | None:
        return None if (phase(message), partition) == ("train", 3) else reply

    carry_out(tmp_path / "rank-1", losing, **keys)
    with pytest.raises(RunFailed, match=r"^round 1: lora\.ranks.*: 2 clients have rank 2") as caught:
        carry_out(tmp_path / "fewer", partial(first_vanish, "train", 1), **keys)
    assert "\n" not in str(caught.value)


def test_layers_at_rest_are_in_no_sketch(cache: Path, tmp_path: Path) -> None:
    keys = {
        "strategy.name": "flexlora", "engine.cohort-size": 1, "strategy.allocation": "random-layers",
        "strategy.allocation-options": '{"layers": 1}',
    }  # fmt: skip
    plain, _ = carry_out(tmp_path / "plain", **{**keys, "secure.mode": "none"})
    summed, _ = carry_out(tmp_path / "sums", **keys)
    whole, _ = carry_out(
        tmp_path / "whole", **{**keys, "strategy.allocation": "all", "strategy.allocation-options": ""}
    )
    assert distance(summed.state, plain.state) < 1e-4
    sent = [run.directory.rounds()[0]["bytes_up"] for run in (summed, whole)]
    assert sent[0] < 0.7 * sent[1]


def test_a_narrow_sketch_sends_less_and_says_what_it_loses(cache: Path, tmp_path: Path) -> None:
    """What is lost of round 1 is what its model lacks, within what four probes a layer tell."""
    keys = {"strategy.name": "fedmomentum", "engine.cohort-size": 1, "num-server-rounds": 1}
    wide, _ = carry_out(tmp_path / "wide", **keys)
    narrow, _ = carry_out(tmp_path / "narrow", **keys, **{"secure.sketch-size": 4})
    line = narrow.directory.rounds()[0]
    assert line["bytes_up"] < 0.6 * wide.directory.rounds()[0]["bytes_up"]
    whole, cut = (
        torch.cat([state.product(n).dense().reshape(-1) for n in state.adapters])
        for state in (wide.state, narrow.state)
    )
    assert line["sketch_lost"] == pytest.approx(float((whole - cut).norm() / whole.norm()), rel=0.5)


def test_gaps_that_sums_do_not_tell_are_not_recorded(cache: Path, tmp_path: Path) -> None:
    """Of two factors that are both averaged; where one of them rests, sums tell all but the cosine."""
    for name, told in (("fedavg", False), ("ffa", True)):
        run, _ = carry_out(tmp_path / name, **{"strategy.name": name, "num-server-rounds": 1})
        line = run.directory.rounds()[0]
        assert ("gap" in line) is told
        assert "cosine" not in line
        assert ("screening and diagnostics," in secure_line(run.config, RULES[name]())) is not told


def test_a_preview_counts_what_is_added_up(cache: Path) -> None:
    """Of a run whose largest weight is what the partitions have; bytes as the round then takes."""
    keys = {"strategy.name": "flexlora", "secure.sketch-size": 4}
    said = dict(preview(config_of(**keys)).lines())
    assert "numbers a layer: up of sketches" in said["traffic"]
    assert "sums of sketched products of at least 3 clients" in said["secure"]


ODD = st.one_of(VALUES, st.booleans(), st.floats(), st.lists(st.text(max_size=4), max_size=3))


@given(size=ODD, seed=ODD, layers=st.one_of(ODD, st.permutations(["q", "v"])))
@settings(max_examples=60, deadline=None)
def test_whatever_sketches_a_server_asks_for_a_client_has_them_or_says_no(
    size: object, seed: object, layers: object
) -> None:
    """Never more numbers than the layers have, and no error but a refusal."""
    factors = {n: LoraFactors(torch.ones(2, 30), torch.ones(40, 2), 1.0) for n in "qv"}
    asked = Step({"sketch": size, "sketch-seed": seed, "layers": layers})
    with suppress(SecureRefused):
        start, trained = _sketched(wire.Reply(status=wire.OK, adapters=factors), asked)
        assert start.keys() == trained.keys()
        assert sum(t.numel() for t in trained.values()) <= 2 * 30 * 40
