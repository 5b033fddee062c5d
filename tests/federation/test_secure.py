"""Runs of which the server sees sums alone: the same results, and nothing in the clear, whoever vanishes."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.handler import handle
from fedlora import wire
from fedlora.config import to_flat
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.secure.step import SECURE, STEP
from strategies.registry import RULES
from tests.federation.secured import (
    ENGINE,
    VALUES,
    carry_out,
    config_of,
    distance,
    first_vanish,
    phase,
)

pytestmark = pytest.mark.slow

SUMS = [name for name, rule in RULES.items() if rule.facts.secure_sum]


def test_directions_at_rest_are_in_no_sum(cache: Path, tmp_path: Path) -> None:
    keys = {
        "strategy.name": "fedavg", "strategy.allocation": "sized-ranks",
        "strategy.allocation-options": '{"ranks": 2}', "model.head": "freeze",
    }  # fmt: skip
    plain, _ = carry_out(tmp_path / "plain", **{**keys, "secure.mode": "none"})
    summed, _ = carry_out(tmp_path / "sums", **keys)
    assert distance(summed.state, plain.state) < 1e-4
    sent = [line["bytes_up"] for line in summed.directory.rounds()]
    assert sent[1] < 0.7 * sent[0]
    with pytest.raises(NotApplicable, match=r"^secure\.mode = 'sums': flexlora adds up sketches of whole"):
        carry_out(tmp_path / "sketch", **{**keys, "strategy.name": "flexlora"})


@pytest.mark.parametrize("name", SUMS)
def test_a_run_ends_where_the_plain_one_ends(name: str, cache: Path, tmp_path: Path) -> None:
    """Within rounding; and with the sum of four, where the fifth gets lost on the way."""
    more = {"data.public": "synthetic"} if RULES[name]().gradient_examples else {}
    keys = {"strategy.name": name, "engine.cohort-size": 1, **more}
    lost = {("train", 3)}

    def vanishing(message: Message, partition: int, reply: Message) -> Message | None:
        return None if (phase(message), partition) in lost else reply

    plain, _ = carry_out(tmp_path / "plain", vanishing, **{**keys, "secure.mode": "none"})
    summed, _ = carry_out(tmp_path / "sums", vanishing, **keys)
    assert distance(summed.state, plain.state) < 1e-4
    lines = summed.directory.rounds()
    assert [line["participants"] for line in lines] == [[0, 1, 2, 4]] * 2
    assert all(line["train_loss"] == pytest.approx(other["train_loss"], abs=1e-3)
               for line, other in zip(lines, plain.directory.rounds(), strict=True))  # fmt: skip


def test_what_arrives_is_noise_and_no_metric(cache: Path, tmp_path: Path) -> None:
    """Every byte value of a masked update is as frequent as another; nothing else of training is told."""
    _, grid = carry_out(tmp_path / "run")
    trained = [content for _, at, content in grid.replies if at == "train"]
    assert len(trained) == 10
    counts: Counter[int] = Counter()
    for content in trained:
        assert not content[wire.ARRAYS]
        assert not content[wire.METRICS]
        counts.update(content[wire.MASKED][wire.MASKED].numpy().tobytes())
    expected = sum(counts.values()) / 256
    statistic = sum((counts[i] - expected) ** 2 / expected for i in range(256))
    assert 150 < statistic < 400  # 255 degrees of freedom


@pytest.mark.parametrize("name", ["fedavg", "fedmomentum"])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    name: str, cache: Path, tmp_path: Path
) -> None:
    keys = {"strategy.name": name, "secure.sketch-size": 0 if name == "fedavg" else 4}
    whole, _ = carry_out(tmp_path / "whole", num_server_rounds=3, **keys)
    stopped, _ = carry_out(tmp_path / "half", **keys)
    assert stopped.state.round == 2
    resumed, _ = carry_out(tmp_path / "half", resume=True, num_server_rounds=3, **keys)
    assert distance(resumed.state, whole.state) == 0


# --- who vanishes, and who lies -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["advertise", "share", "train", "unmask"])
@pytest.mark.parametrize("gone", [1, 2])
def test_a_round_goes_on_without_who_vanishes_before_any_phase(
    at: str, gone: int, cache: Path, tmp_path: Path
) -> None:
    """As long as as many stay as the threshold says: 4 of 5 holders at 0.66, 3 of them at 0.6."""
    run, _ = carry_out(tmp_path / "run", partial(first_vanish, at, gone), **{"secure.threshold": 0.6})
    line = run.directory.rounds()[-1]
    lost = 0 if at == "unmask" else gone
    assert line["participants"] == list(range(lost, 5))
    plain, _ = carry_out(tmp_path / "plain", partial(first_vanish, "train", lost), **{"secure.mode": "none"})
    assert distance(run.state, plain.state) < 1e-4


def test_too_few_fail_the_run_in_one_line(cache: Path, tmp_path: Path) -> None:
    for at, why in (
        ("advertise", "2 clients sent keys, secure.min-clients = 3"),
        ("share", "2 clients shared their secrets, secure.min-clients = 3"),
        ("train", "2 clients uploaded, secure.min-clients = 3"),
        ("unmask", "2 shares of partition 0's secret are left, 4 needed"),
    ):
        with pytest.raises(RunFailed, match=why) as caught:
            carry_out(tmp_path / at, partial(first_vanish, at, 3))
        assert "\n" not in str(caught.value)


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_one_client_answers_the_others_sum_is_right_or_the_run_fails(
    data: st.DataObject, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A step's record with keys of other values, or none; a masked update of another shape or kind."""
    at = data.draw(st.sampled_from(["advertise", "share", "train", "unmask"]))

    def lying(message: Message, partition: int, reply: Message) -> Message | None:
        if partition != 2 or phase(message) != at or message.metadata.group_id != "1":
            return reply
        content = reply.content
        if at == "train":
            drawn = data.draw(st.sampled_from([np.zeros(3, "<u4"), np.zeros((2, 2)), np.zeros(9, "<u8")]))
            content[wire.MASKED] = wire.to_record({wire.MASKED: torch.from_numpy(drawn.astype("<f4"))})
        else:
            record = dict(content[SECURE])
            key = data.draw(st.sampled_from(sorted(record)))
            record.pop(key)
            if data.draw(st.booleans()):
                record[key] = data.draw(VALUES)
            content[SECURE] = ConfigRecord(record)
        return Message(content, reply_to=message)

    home = tmp_path_factory.mktemp("lying")
    keys = {"num-server-rounds": 1, "secure.threshold": 0.6}
    run, _ = carry_out(home / "run", lying, **keys)
    there = run.directory.rounds()[0]["participants"]
    assert there == ([0, 1, 2, 3, 4] if at == "unmask" or 2 in there else [0, 1, 3, 4])

    def without(message: Message, partition: int, reply: Message) -> Message | None:
        return None if partition not in there and phase(message) == "train" else reply

    plain, _ = carry_out(home / "plain", without, **{**keys, "secure.mode": "none"})
    assert distance(run.state, plain.state) < 1e-4


# --- a client and its owner ---------------------------------------------------------------------------


def step(node: dict[str, Any], state: RecordDict, **keys: Any) -> ConfigRecord:
    content = RecordDict({SECURE: ConfigRecord(keys)})
    return handle(STEP, content, to_flat(config_of()), node, ENGINE.runtimes, state)[SECURE]


def test_a_client_forgets_a_round_once_it_has_unmasked_it(cache: Path, tmp_path: Path) -> None:
    """Asked again for the same sum, or a smaller one, it has nothing to tell."""
    seen: dict[int, Message] = {}

    def watching(message: Message, partition: int, reply: Message) -> Message | None:
        if phase(message) == "unmask":
            seen[partition] = message
        return reply

    _, grid = carry_out(tmp_path / "run", watching)
    message = seen[0]
    for survivors in ([0, 1, 2, 3, 4], [0, 1, 2]):
        message.content[SECURE]["survivors"] = survivors
        [reply] = grid.inner.send_and_receive([message])
        assert "no keys for that round" in str(reply.content[SECURE]["reason"])


@pytest.mark.parametrize(
    "asked",
    [
        {"phase": "share", "session": "a", "partitions": [0], "keys": [b"k"]},
        {"phase": "unmask", "session": "a", "survivors": [0, 1, 2]},
        {"phase": "other", "session": "a"},
        {"phase": "advertise"},
        {"phase": 3, "session": "a"},
        {},
    ],
)
def test_a_stray_step_is_refused_in_one_line(asked: dict[str, Any], cache: Path) -> None:
    told = step({"partition-id": 0, "simulation": True}, RecordDict(), **asked)
    assert set(told) == {"reason"}
    assert "\n" not in str(told["reason"])


def test_an_owner_says_how_many_a_sum_must_be_of(cache: Path, tmp_path: Path) -> None:
    """A node that wants six in a sum does not share among five; without sums it does not train at all."""
    node, state = {"partition-id": 0, "secure-clients": 6, "state-dir": str(tmp_path)}, RecordDict()
    assert "keys" in step(node, state, phase="advertise", session="a")
    own = step(node, state, phase="advertise", session="b")["keys"]
    keys = [own, *(bytes([i]) * 64 for i in range(4))]
    told = step(node, state, phase="share", session="b", partitions=list(range(5)), keys=keys)
    assert told["reason"] == "5 clients advertise keys, the least is 6"


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"strategy.name": "flora"}, "flora needs each client's own factors"),
        ({"strategy.name": "raflora"}, "raflora needs each client's own factors"),
        ({"strategy.name": "florist"}, "florist needs each client's own factors"),
        (
            {"strategy.name": "flexlora", "lora.ranks": "1,2"},
            "client-groups: 2 clients have rank 2 in all layers .* secure.min-clients = 3",
        ),
        (
            {
                "strategy.name": "flexlora",
                "client-groups": '[{"partitions": "1-3", "target-modules": "query"}]',
            },
            "client-groups: 2 clients have rank 2 in all layers .* secure.min-clients = 3",
        ),
        ({"secure.sketch-size": 8}, "secure.sketch-size = 8: fedavg adds up no products"),
        ({"secure.sketch-size": -1, "strategy.name": "flexlora"}, "secure.sketch-size = -1"),
        ({"strategy.robust": "median"}, "strategy.robust = 'median' looks at single updates"),
        ({"strategy.screening": "on"}, "strategy.screening = 'on' compares single updates"),
        ({"strategy.max-update-norm": 1.0}, "strategy.max-update-norm = 1.0 looks at single updates"),
        (
            {"privacy.mode": "client", "privacy.noise-multiplier": 1.0},
            "'client' clips single .* 'distributed'",
        ),
        ({"upload": "int8"}, "upload = 'int8'"),
        ({"devices.tiers": 2, "devices.profiles": "equal"}, "devices.tiers = 2 looks at single updates"),
        ({"lora.ranks": "2,4", "strategy.name": "zero-padding"}, "cannot be added up"),
        ({"client-groups": '[{"partitions": "0", "alpha": 3.0}]'}, "cannot be added up"),
        (
            {"fraction-train": 0.4},
            "fraction-train = 0.4: a round asks 2 of 5 clients, secure.min-clients = 3",
        ),
        ({"data.num-partitions": 2}, "secure.min-clients = 3: only 2 clients take part"),
        ({"secure.max-weight": 10**9}, "secure.max-weight = 1000000000: sums of 5 such weights overflow"),
        ({"secure.bits": 12}, "secure.bits = 12: accepted are 16, 24, 32, 64"),
        ({"secure.threshold": 0.5}, "secure.threshold = 0.5"),
        ({"secure.mode": "sum"}, "did you mean sums"),
    ],
)
def test_what_excludes_secure_sums_is_refused_before_anything_starts(
    keys: dict[str, Any], why: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        carry_out(tmp_path / "run", **keys)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_claim_beyond_the_largest_weight_takes_no_part(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"its num-examples is not whole, or beyond secure.max-weight = 5\)"):
        carry_out(tmp_path / "run", **{"secure.max-weight": 5})


def test_rounding_that_spoils_an_update_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("strategies.secure.log", lambda level, text, *more: said.append(text % more))
    carry_out(tmp_path / "fine")
    assert not said
    carry_out(tmp_path / "coarse", **{"secure.largest-change": 1e6})
    assert said
    assert all(
        re.fullmatch(
            r"secure.largest-change = 1000000.0: rounding is up to \d+ % of the update at secure.bits = 32",
            line,
        )
        for line in said
    )
