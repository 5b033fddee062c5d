"""DPO: the published formula restated, references, rows that are refused, and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.evaluation import evaluate
from clients.training.batched.self_check import check_cohort
from clients.training.batches import load_batch
from clients.training.dp_mechanism import Mechanism
from clients.training.reference import with_references
from clients.training.self_check import check_steps
from clients.training.train import batch_loss
from fedlora.config import DataConfig
from fedlora.data.chat.preferences import pair
from fedlora.data.examples import collate
from fedlora.errors import ConfigError, NotApplicable
from fedlora.evaluation.adapter import evaluate_adapter
from fedlora.models import AdaptedModel, AdapterCard, build_model
from fedlora.server.validate import check
from fedlora.tasks.preference import Preference
from tests.conftest import tiny_config
from tests.federation.test_kinds import run, values
from tests.in_process import client_runtime
from tests.models.samples import random_adapters, random_patch

BETA = 0.3
TALK = [{"role": "user", "content": "hi"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def rows(number: int = 24) -> list[dict[str, Any]]:
    """Whoever asks wants the letter a, not b."""
    return [
        {"prompt": f"say {n}", "chosen": "a" * (3 + n % 4), "rejected": "b" * (3 + n % 3), "who": str(n % 3)}
        for n in range(number)
    ]


def keys(data: str, **more: Any) -> dict[str, Any]:
    return {
        "task": "dpo", "model.name": "tiny-lm", "data.name": data, "data.partition-by": "who",
        "data.max-length": 48, "train.dpo-beta": BETA, "num-server-rounds": 2, "train.local-steps": 4,
        "train.learning-rate": 0.03, "data.evaluate-examples": 0, **more,
    }  # fmt: skip


@pytest.fixture
def given(tmp_path: Path, cache: Path) -> tuple[AdaptedModel, Any, Any]:
    """A model with a random adapter, examples, and their padding."""
    runtime = client_runtime(tiny_config(**keys(jsonl(tmp_path / "pairs.jsonl", rows()))))
    model = runtime.model
    model.base.reset()
    model.load(random_adapters(model.modules, 4), {}, trained=frozenset("AB"))
    return model, runtime.data.train, runtime.data.pad_token_id


def by_hand(module: Any, reference: Any, examples: Any, i: int) -> torch.Tensor:
    """The loss of one pair, each side alone and unpadded, from log softmax of transformers' own logits."""
    ratios = []
    for start, end in (
        (examples.offsets[i], examples.splits[i]),
        (examples.splits[i], examples.offsets[i + 1]),
    ):
        ids = torch.tensor(examples.tokens[start:end].astype(np.int64))[None]
        answered = torch.tensor(examples.counted[start:end])[None, 1:].bool()
        said = []
        for network in (module, reference):
            log = network(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            said.append(log[answered].sum())
        ratios.append(said[0] - said[1].detach())
    return torch.log1p(torch.exp(-BETA * (ratios[0] - ratios[1])))


def test_the_loss_is_that_of_the_paper_with_the_base_as_reference(
    given: tuple[AdaptedModel, Any, Any],
) -> None:
    model, examples, pad = given
    base = build_model(tiny_config(**{"model.name": "tiny-lm"}).model, 0, 0, "language-model")
    chosen = np.arange(6)
    known = with_references(model, examples, [chosen], pad)
    with model.training() as trained:
        losses = batch_loss(model, load_batch(known, chosen, pad, model.device), "none")
        wanted = torch.stack([by_hand(model.module, base, examples, i) for i in chosen])
        torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(losses.sum(), trained.all, retain_graph=True)
        for gradient, other in zip(found, torch.autograd.grad(wanted.sum(), trained.all), strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-5)
    assert len({round(float(loss), 3) for loss in losses}) > 3


def test_the_reference_is_the_base_of_the_start_whatever_was_added_to_it(
    given: tuple[AdaptedModel, Any, Any],
) -> None:
    model, examples, pad = given
    before = with_references(model, examples, [np.arange(6)], pad).reference
    model.references.clear()
    model.base.move([random_patch(model.modules, 2, 0)])
    moved = {name: model.module.get_submodule(name) for name in model.modules}
    weights = {name: layer.base_layer.weight.clone() for name, layer in moved.items()}
    after = with_references(model, examples, [np.arange(6)], pad).reference
    assert before is not None
    assert after is not None
    assert np.array_equal(before, after)
    assert np.all(before[:6] < 0)
    for name, layer in moved.items():
        assert torch.equal(layer.base_layer.weight, weights[name])
        assert not layer.disable_adapters
    model.base.reset()


def test_evaluation_says_accuracy_and_margin_of_rewards(given: tuple[AdaptedModel, Any, Any]) -> None:
    model, examples, pad = given
    base = build_model(tiny_config(**{"model.name": "tiny-lm"}).model, 0, 0, "language-model")
    found = evaluate(model, examples, np.arange(8), pad)
    with torch.no_grad():
        wanted = torch.stack([by_hand(model.module, base, examples, i) for i in range(8)]).double()
    margins = -torch.log(torch.expm1(wanted))
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-3, atol=1e-5)
    assert found.right.tolist() == (margins > 0).long().tolist()
    from fedlora.tasks.preference import margin

    assert margin(found.losses) == pytest.approx(float(margins.mean()), rel=1e-2, abs=1e-3)


def test_cohorts_compute_what_clients_do(given: tuple[AdaptedModel, Any, Any]) -> None:
    model, _, pad = given
    check_cohort(model, pad, None)


@pytest.mark.parametrize("mode", ["hooks", "loop"])
def test_private_steps_clip_each_pair(mode: str, given: tuple[AdaptedModel, Any, Any]) -> None:
    model, _, pad = given
    check_steps(
        model, pad, Mechanism(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1,
                              grad_sample_mode=mode),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["fedavg", "flora"])
def test_a_run_prefers_what_was_chosen(strategy: str, tmp_path: Path, cache: Path) -> None:
    data = jsonl(tmp_path / "pairs.jsonl", rows())
    given = keys(data, **{"strategy.name": strategy})
    alone = run(tmp_path / "alone", **given)
    together = run(tmp_path / "together", together=True, **given)
    for name, tensor in values(alone).items():
        torch.testing.assert_close(values(together)[name], tensor, rtol=1e-3, atol=2e-4)
    lines = (tmp_path / "alone" / "run" / "rounds.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert last["accuracy"] == 1.0
    assert last["margin"] > first["margin"] > 0
    assert last["loss"] < first["loss"] < np.log(2)
    found = evaluate_adapter(
        tmp_path / "alone" / "run" / "adapter", data, text_column="text", label_column="label"
    )
    assert found["margin"] > first["margin"] / 2
    assert AdapterCard.read(tmp_path / "alone" / "run" / "adapter").dpo_beta == BETA


def test_private_runs_and_their_epsilon(tmp_path: Path, cache: Path) -> None:
    data = jsonl(tmp_path / "pairs.jsonl", rows())
    private = {"privacy.mode": "example", "privacy.noise-multiplier": 2.0, "num-server-rounds": 1}
    run(tmp_path, **keys(data, **private, **{"train.batch-size": 2}))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 0 < result["epsilon"] < 5


@pytest.mark.parametrize(
    ("cells", "prompt", "ends"),
    [
        (("hi", "yes", "no"), ["hi"], ("yes", "no")),
        ((TALK, answer("yes"), answer("no")), ["hi"], ("yes", "no")),
        ((TALK + answer("yes"), TALK + answer("no")), ["hi"], ("yes", "no")),
        (("hi", TALK + answer("yes"), TALK + answer("no")), ["hi"], ("yes", "no")),
        ((json.dumps(TALK), json.dumps(answer("yes")), json.dumps(answer("no"))), ["hi"], ("yes", "no")),
        (
            ([*TALK, *answer("o"), *TALK, *answer("yes")], [*TALK, *answer("o"), *TALK, *answer("no")]),
            ["hi", "o", "hi"], ("yes", "no"),
        ),
    ],
)  # fmt: skip
def test_forms_of_pairs(cells: tuple[Any, ...], prompt: list[str], ends: tuple[str, str]) -> None:
    for side, end in zip(pair(cells, None, "row 1"), ends, strict=True):
        assert [turn.content for turn in side.turns] == [*prompt, end]
        assert [t.content for t in side.turns if t.role == "assistant" and t.learned] == [end]


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": ""}, "rejected is empty"),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "chosen is empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "has no prompt"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "p", "chosen": 3, "rejected": "b"}, "chosen holds int 3, must be text or messages"),
        ({"prompt": "p", "chosen": "a", "rejected": answer("b")}, "one of chosen and rejected is a text"),
        (
            {"prompt": None, "chosen": TALK + answer("a"), "rejected": answer("b")},
            "do not begin with the same messages",
        ),
        (
            {"prompt": None, "chosen": [{"role": "king", "content": "a"}] * 2, "rejected": answer("b") * 2},
            "do not begin with the same",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_one_line_with_its_file(
    odd: dict[str, Any], why: str, tmp_path: Path, cache: Path
) -> None:
    fine = {"prompt": "p", "chosen": "a", "rejected": "b"}
    data = jsonl(tmp_path / "odd.jsonl", [fine, odd])
    config = tiny_config(**keys(data, **{"data.partitioner": "iid", "data.num-partitions": 2}))
    with pytest.raises(ConfigError, match="row 2 of ") as error:
        client_runtime(config)
    text = str(error.value)
    assert why in text
    assert "odd.jsonl" in text
    assert text.startswith("data.text-column = 'prompt,chosen,rejected': ")
    assert "\n" not in text


def test_what_pairs_cannot_have_is_refused(tmp_path: Path) -> None:
    data = {"task": "dpo", "model.name": "tiny-lm"}
    with pytest.raises(NotApplicable, match=r"^train\.packing = true: task dpo compares pairs"):
        check(tiny_config(**data, **{"train.packing": True}))
    with pytest.raises(ConfigError, match=r"must name prompt, chosen and rejected, or chosen and rejected$"):
        Preference().columns(DataConfig(text_column="answers"))
    with pytest.raises(ConfigError, match=r"^train\.dpo-beta = 0: must be > 0"):
        tiny_config(**data, **{"train.dpo-beta": 0})


def test_a_side_without_room_is_left_out(tmp_path: Path, cache: Path) -> None:
    long = {"prompt": "p" * 90, "chosen": "a", "rejected": "b", "who": "0"}
    with pytest.warns(UserWarning, match="are left out") as told:
        runtime = client_runtime(tiny_config(**keys(jsonl(tmp_path / "p.jsonl", [*rows(), long]))))
    assert any(": 1 of " in str(line.message) for line in told)
    both = [runtime.data.train, runtime.data.test]
    assert sum(map(len, both)) == 24
    batch = collate(both[0], [0, 1], runtime.data.pad_token_id)
    assert batch["rejected_input_ids"].shape[0] == batch["input_ids"].shape[0] == 2
    whole = jsonl(tmp_path / "q.jsonl", [long | {"prompt": f"{n}" * 90} for n in range(9)])
    with pytest.raises(ConfigError, match=r"^data\.max-length = 48: no pair has a word of both answers"):
        client_runtime(tiny_config(**keys(whole)))
