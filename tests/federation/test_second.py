"""Second adapters in whole runs: nothing that is sent knows of them, and clients gain by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import load_peft_weights

from clients.execute_evaluation import evaluate_instruction
from clients.node import Node
from clients.personal import SECOND
from fedlora.config import from_flat
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.export import kept_by
from fedlora.server.personal import second_summary
from fedlora.server.results import read_rounds
from fedlora.server.validate import check
from fedlora.simulation.simulate import simulate
from fedlora.tasks import CLASSIFICATION
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

ON = {"lora.personal-rank": 2}
DP = {"privacy.mode": "example", "privacy.noise-multiplier": 1.0, "privacy.max-grad-norm": 1.0}


def run(path: Path, *, resume: bool = False, **keys: Any) -> dict[str, Any]:
    return simulate(tiny_config(**{"num-server-rounds": 2, **keys}), path, resume=resume)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_peft_weights(str(path), device="cpu")


def seconds(path: Path, rounds: int = 2) -> dict[int, dict[str, torch.Tensor]]:
    store = next((path / "clients").glob("*/personal")).parent  # ledgers lie beside it
    return kept_by(store, range(4), rounds, SECOND)


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.name": "fedavg", "train.proximal-mu": 0.1},
        {"strategy.name": "flora", "lora.ranks": "2,4"},
        {"strategy.name": "fed-sb"},
        {"strategy.name": "fedavg", **DP},
        {"strategy.name": "fedavg", "secure.mode": "sums"},
        {"strategy.name": "ffa", "privacy.mode": "client", "privacy.noise-multiplier": 1.0},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_what_is_sent_does_not_know_of_it(keys: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    """The same global adapter bit by bit, the same bytes up, the same epsilon; clients have their own."""
    plain, found = run(tmp_path / "plain", **keys), run(tmp_path / "second", **keys, **ON)
    expected, ours = weights(tmp_path / "plain" / "adapter"), weights(tmp_path / "second" / "adapter")
    assert all(torch.equal(expected[name], ours[name]) for name in expected)
    for one, other in zip(read_rounds(tmp_path / "plain"), read_rounds(tmp_path / "second"), strict=True):
        assert one["bytes_up"] == other["bytes_up"]
        assert one["epsilon"] == other["epsilon"]
        assert one["accuracy"] == other["accuracy"]
    own = seconds(tmp_path / "second")
    assert sorted(own) == [0, 1, 2, 3]
    assert not any(torch.equal(own[0][name], own[1][name]) for name in own[0])
    assert ("personal" in found) == (keys.get("privacy.mode") is None)
    assert "personal" not in plain


@pytest.mark.parametrize("cohort", [1, 4])
@pytest.mark.parametrize("bond", ["train.proximal-mu", "train.nested-ranks"])
def test_what_binds_the_global_adapter_does_not_bind_the_second(
    bond: str, cohort: int, tmp_path: Path, cache: Path
) -> None:
    """In round 1 all receive the same with it and without it, and a second adapter stands beside that."""
    keys = {**ON, "strategy.name": "zero-padding", "num-server-rounds": 1, "engine.cohort-size": cohort}
    run(tmp_path / "free", **keys)
    run(tmp_path / "bound", **keys, **{bond: 5.0 if bond == "train.proximal-mu" else True})
    free, bound = (seconds(tmp_path / name, 1) for name in ("free", "bound"))
    assert all(torch.equal(free[k][name], bound[k][name]) for k in free for name in free[k])
    one, other = (weights(tmp_path / name / "adapter") for name in ("free", "bound"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("by", ["one", "input"])
def test_cohorts_train_them_as_clients_alone_do(by: str, tmp_path: Path, cache: Path) -> None:
    """Ranks of the global adapter that differ stand beside in one cohort."""
    keys = {"strategy.name": "flexlora", "lora.ranks": "2,4", **ON, "lora.personal-weights": by}
    run(tmp_path / "alone", **keys, **{"engine.cohort-size": 1})
    run(tmp_path / "together", **keys, **{"engine.cohort-size": 4})
    alone, together = seconds(tmp_path / "alone"), seconds(tmp_path / "together")
    for client, tensors in alone.items():
        assert any(tensor.abs().max() > 1e-3 for name, tensor in tensors.items() if ".lora_B." in name)
        for name, tensor in tensors.items():
            torch.testing.assert_close(together[client][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_has_the_same_ones(tmp_path: Path, cache: Path) -> None:
    run(tmp_path / "whole", **ON, **{"num-server-rounds": 3})
    run(tmp_path / "cut", **ON)
    run(tmp_path / "cut", resume=True, **ON, **{"num-server-rounds": 3})
    whole, cut = seconds(tmp_path / "whole", 3), seconds(tmp_path / "cut", 3)
    assert all(torch.equal(whole[k][name], cut[k][name]) for k in whole for name in whole[k])


@pytest.mark.parametrize("by", ["one", "input"])
def test_figures_are_of_both_models_on_the_same_examples(by: str, tmp_path: Path, cache: Path) -> None:
    """The exported model of a client is what it evaluated; the global one is the server's own figure.

    With weights by the input it is at half of each, as in training.
    """
    keys = {"train.local-steps": 8, "num-server-rounds": 3, "lora.personal-weights": by}
    found, share = run(tmp_path, **ON, **keys), 0.5 if by == "input" else 1.0
    personal, clients = found["personal"], found["accuracy_by_client"]
    assert personal["accuracy_of_global_by_client"] == pytest.approx(clients)
    gains = [personal["accuracy_by_client"][k] - clients[k] for k in clients]
    assert personal["gain_over_global"] == pytest.approx(sum(gains) / 4)
    assert personal["gain_over_global_worst_decile"] == pytest.approx(min(gains))
    shared, own = weights(tmp_path / "adapter"), weights(tmp_path / "adapters" / "client-1")
    second, scaling = seconds(tmp_path, 3)[1], 16 / 2
    for name in (n for n in shared if n.endswith("lora_A.weight")):
        b = name.replace("lora_A", "lora_B")
        wanted = share * (16 / 4 * shared[b] @ shared[name] + scaling * second[b] @ second[name])
        torch.testing.assert_close(own[b] @ own[name], wanted, rtol=1e-3, atol=1e-4)


def test_clients_that_tell_one_figure_alone_do_not_count() -> None:
    whole = {"num-examples": 4.0, "accuracy": 0.5, "loss": 1.0, "accuracy-of-global": 0.25}
    foreign = {"num-examples": 4.0, "accuracy": 1.0, "loss": 1.0}
    found = second_summary({0: whole, 1: foreign}, (), CLASSIFICATION)["personal"]
    assert found["accuracy_by_client"] == {"0": 0.5}
    assert found["gain_over_global"] == 0.25
    assert second_summary({1: foreign}, (), CLASSIFICATION) == {}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"strategy.name": "fedsa"}, "clients keep a personal factor of fedsa already"),
        ({"model.head": "local"}, "clients keep model.head = 'local' already"),
        ({"strategy.name": "head-only"}, "head-only makes no global adapter"),
        ({"lora.method": "vera"}, "is of lora"),
        ({"load-best-model-at-end": True}, "those of the last round"),
        ({"devices.buffer-size": 2}, "needs rounds that wait"),
    ],
)
def test_where_it_cannot_stand_it_is_refused(keys: dict[str, Any], said: str) -> None:
    check(from_flat(ON))
    with pytest.raises(NotApplicable, match=f"lora.personal-rank = 2: .*{said}"):
        check(from_flat({**ON, **keys}))


def test_weights_by_input_are_of_clients_own_models_alone(tmp_path: Path, cache: Path) -> None:
    """What is sent stays, what a client is told of the global model too; its own figures are others."""
    keys = {**ON, "train.local-steps": 8, "train.learning-rate": 0.02}
    one = run(tmp_path / "one", **keys)
    ours = run(tmp_path / "input", **keys, **{"lora.personal-weights": "input"})
    expected, found = weights(tmp_path / "one" / "adapter"), weights(tmp_path / "input" / "adapter")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    key = "accuracy_of_global_by_client"
    assert ours["personal"][key] == one["personal"][key]
    assert ours["personal"]["loss"] != one["personal"]["loss"]
    again = run(tmp_path / "again", **keys, **{"lora.personal-weights": "input"})
    assert again["personal"] == ours["personal"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora.personal-rank": 0}, "weighs a second adapter, lora.personal-rank is 0"),
        (
            {"task": "causal-lm", "model.name": "tiny-lm", "data.name": "novels"},
            "accepted are those with labels, instruction",
        ),
    ],
)
def test_weights_by_input_need_a_second_adapter_and_inputs(keys: dict[str, Any], said: str) -> None:
    on = {**ON, "lora.personal-weights": "input"}
    check(from_flat(on))
    with pytest.raises(NotApplicable, match=f"lora.personal-weights = 'input': .*{said}"):
        check(from_flat({**on, **keys}))


def test_a_rank_that_no_layer_allows_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.personal-rank = 4000: .* allows at most"):
        run(tmp_path, **{"lora.personal-rank": 4000})
    assert not (tmp_path / "rounds.jsonl").exists()


def test_under_privacy_no_server_is_told_what_it_reaches(tmp_path: Path) -> None:
    """Whatever the server asks: P Q is trained without noise, so its figures are outside epsilon."""
    config: Any = tiny_config(**ON, **DP)
    with pytest.raises(ConfigError, match="outside epsilon"):
        evaluate_instruction(None, None, config, Node(partition_id=0, state_dir=tmp_path))  # type: ignore[arg-type]
