"""Regression and many labels: losses and measures restated, refusals, runs and their exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List
from scipy.stats import pearsonr
from transformers.loss.loss_utils import ForSequenceClassificationLoss

import fedlora
from clients.training.batched.self_check import check_cohort
from clients.training.batches import load_batch
from clients.training.dp_mechanism import Mechanism
from clients.training.self_check import check_steps
from clients.training.train import batch_loss
from fedlora.data.targets import TARGETS, encode_targets, read_targets
from fedlora.errors import ConfigError, NotApplicable
from fedlora.evaluation.adapter import evaluate_adapter
from fedlora.server.best import best_round
from fedlora.server.validate import check
from fedlora.tasks.targets import MultiLabelClassification, Regression
from tests.conftest import tiny_config
from tests.federation.test_kinds import run, values
from tests.in_process import client_runtime
from tests.models.elsewhere import Elsewhere
from tests.models.families import save
from tests.models.samples import logits, random_adapters, token_batch
from tests.models.test_auto import exported

REGRESSION = {"task": "regression", "data.label-column": "stars,size"}
LABELS = {"task": "multi-label-classification", "data.label-column": "tags"}
TASKS = pytest.mark.parametrize("of_task", [REGRESSION, LABELS], ids=lambda keys: keys["task"])


def rows(number: int = 36) -> list[dict[str, Any]]:
    """One word of a text decides its targets."""
    words = ("dull", "fair", "superb")
    return [
        {
            "text": f"{words[n % 3]} film {n // 3}", "stars": float(n % 3) - 1, "size": int(n % 3 == 1),
            "tags": [name for name, has in (("fine", n % 3), ("even", n % 3 == 1)) if has],
            "who": f"w{n // 3 % 3}",
        }
        for n in range(number)
    ]  # fmt: skip


def jsonl(path: Path, given: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, given)))
    return str(path)


def keys(data: str, **more: Any) -> dict[str, Any]:
    return {
        "data.name": data, "data.partition-by": "who", "data.max-length": 32, "num-server-rounds": 2,
        "train.local-steps": 4, "train.learning-rate": 0.03, "data.evaluate-examples": 0, **more,
    }  # fmt: skip


@TASKS
def test_loss_is_that_of_transformers_problem_type(
    of_task: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    runtime = client_runtime(tiny_config(**keys(jsonl(tmp_path / "a.jsonl", rows()), **of_task)))
    model, task = runtime.model, runtime.model.task
    model.load(random_adapters(model.modules, 4), {})
    batch = load_batch(runtime.data.train, np.arange(6), runtime.data.pad_token_id, model.device)
    config = model.module.config
    config.problem_type, config.num_labels = task.problem_type, 2
    wanted = ForSequenceClassificationLoss(batch["labels"], logits(model.module, batch), config)
    with model.training():
        each = batch_loss(model, batch, "none")
    torch.testing.assert_close(each.mean(), wanted)
    assert each.shape == (6,)
    assert each.std() > 0


def test_measures_are_those_of_the_field() -> None:
    rng = np.random.default_rng(0)
    y, f = rng.normal(size=(50, 3)).astype(np.float32), rng.normal(size=(50, 3)).astype(np.float32)
    found = Regression().measures(f, y)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((f - y) ** 2)), rel=1e-6)
    assert found["r2"] == pytest.approx(
        np.mean(1 - ((f - y) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)), rel=1e-6
    )
    assert found["pearson"] == pytest.approx(
        np.mean([pearsonr(f[:, k], y[:, k])[0] for k in range(3)]), rel=1e-6
    )
    same = np.ones((4, 1), dtype=np.float32)
    assert Regression().measures(same, same) == {"rmse": 0.0, "mae": 0.0, "r2": 1.0, "pearson": None}
    assert Regression().measures(same + 1, same) == {"rmse": 1.0, "mae": 1.0, "r2": 0.0, "pearson": None}

    has = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=np.float32)
    out = np.array([[1, 1, -1], [1, -1, -1], [-1, 1, -1], [0, -1, -1]], dtype=np.float32)
    found = MultiLabelClassification().measures(out, has)
    assert found == {"f1_micro": 2 * 3 / (4 + 4), "f1_macro": pytest.approx((1.0 + 2 / 4 + 0.0) / 3)}
    assert MultiLabelClassification().baseline(has) == {
        "majority_accuracy": pytest.approx((0.5 + 0.5 + 1) / 3),
        "all_f1_micro": 2 * 4 / (4 + 12), "all_f1_macro": pytest.approx((2 * 2 / 6 * 2 + 0.0) / 3),
    }  # fmt: skip
    away = np.abs(y - y.mean(axis=0))
    assert Regression().baseline(y) == {
        "mean_rmse": pytest.approx(np.sqrt(y.var(axis=0).mean()), rel=1e-6),
        "mean_mae": pytest.approx(away.mean(), rel=1e-6), "mean_r2": pytest.approx(0.0, abs=1e-6),
    }  # fmt: skip


@TASKS
def test_cohorts_and_private_steps_keep_examples_apart(
    of_task: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    runtime = client_runtime(tiny_config(**keys(jsonl(tmp_path / "a.jsonl", rows()), **of_task)))
    model, pad = runtime.model, runtime.data.pad_token_id
    model.load(random_adapters(model.modules, 4), {}, trained=frozenset("AB"))
    check_cohort(model, pad, None)
    for mode in ("hooks", "ghost", "loop"):
        step = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1}
        check_steps(model, pad, Mechanism(**step, grad_sample_mode=mode))


@TASKS
def test_runs_alone_and_together(of_task: dict[str, str], tmp_path: Path, cache: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", rows(90))
    given = keys(data, **of_task, **{"train.local-steps": 20, "data.partitioner": "natural"})
    alone = run(tmp_path / "alone", **given)
    together = run(tmp_path / "together", together=True, **given)
    for name, tensor in values(alone).items():
        torch.testing.assert_close(values(together)[name], tensor, rtol=1e-3, atol=5e-4)
    home = tmp_path / "alone" / "run"
    result = json.loads((home / "result.json").read_text())
    if of_task is REGRESSION:
        assert result["labels"] == ["stars", "size"]
        assert result["accuracy"] is None
        assert result["rmse"] < 0.9 * result["mean_rmse"]
        assert result["r2"] > 0
    else:
        assert result["labels"] == ["even", "fine"]
        assert result["accuracy"] > result["majority_accuracy"]
        assert result["f1_macro"] > 0.5
    column = of_task["data.label-column"]
    found = evaluate_adapter(home / "adapter", data, text_column="text", label_column=column)
    told = fedlora.load(home / "adapter").predict([row["text"] for row in rows(90)])
    if of_task is REGRESSION:
        errors = [
            list(p.values.values()) - np.array([r["stars"], r["size"]])
            for p, r in zip(told, rows(90), strict=True)
        ]
        assert found["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)
        with pytest.raises(fedlora.ConfigError, match="a regression has none, values has stars, size"):
            _ = told[0].label
    else:
        right = [
            (name in p.labels) == (name in r["tags"])
            for p, r in zip(told, rows(90), strict=True)
            for name in ("even", "fine")
        ]
        assert found["accuracy"] == pytest.approx(np.mean(right))
        assert told[0].probability == max(told[0].probabilities.values())


@pytest.mark.parametrize(
    ("task", "kind", "labels"),
    [
        ("regression", "regression", 1),
        ("multi-label-classification", "multi_label_classification", 20),
    ],
)
def test_exports_predict_the_same_in_peft_and_merged(
    task: str, kind: str, labels: int, elsewhere: Elsewhere, tmp_path: Path
) -> None:
    base = save(tmp_path / "base", "bert", "MaskedLM")
    names = tuple(f"t{n}" for n in range(labels))
    adapter, model = exported(tmp_path / "adapter", str(base), task, names, {"model.pooling": "model"})
    found = elsewhere.opened(
        "AutoPeftModelForSequenceClassification", adapter, token_batch(60), num_labels=labels,
        problem_type=kind,
    )  # fmt: skip
    assert found.shape[1] == labels
    torch.testing.assert_close(found, logits(model.module, token_batch(60)), rtol=1e-4, atol=1e-4)
    assert f'num_labels={labels}, problem_type="{kind}"' in (adapter / "README.md").read_text()
    fedlora.aggregate([adapter], tmp_path / "merged", merge=True)
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert said["problem_type"] == kind
    assert len(said["id2label"]) == labels


@pytest.mark.parametrize(
    ("of_task", "odd", "why"),
    [
        (REGRESSION, {"stars": float("nan")}, "data.label-column = 'stars': row 2 of .* holds nothing"),
        (REGRESSION, {"stars": "many"}, "row 2 of .* holds the text 'many', must be a number"),
        (REGRESSION, {"stars": True}, "holds the truth value true, must be a number"),
        (REGRESSION, {"stars": None}, "row 2 of .* holds nothing"),
        (REGRESSION, {"stars": [1.0]}, r"holds the list \[1.0\], must be a number"),
        (REGRESSION, {"stars": 1e39}, r"holds the number 1e\+39, must be a finite number of 32 bits"),
        (REGRESSION | {"data.label-column": "stars,none"}, {}, "= 'stars,none': no column 'none' in"),
        (REGRESSION | {"data.label-column": "stars,stars"}, {}, "names a column twice"),
        (REGRESSION | {"data.partitioner": "dirichlet", "data.num-partitions": 2}, {}, "goes by one label"),
        (LABELS | {"data.label-column": "stars"}, {"stars": 0.5}, "the number -1, must be 0 or 1"),
        (LABELS, {"tags": "fine"}, "row 2 of .* holds the text 'fine', must be a list of names"),
        (LABELS, {"tags": ["fine", " "]}, "row 2 of .* holds an empty name in a list"),
        (LABELS, {"tags": [0.5]}, "holds the number 0.5; must be texts"),
    ],
)  # fmt: skip
def test_odd_targets_are_one_line(
    of_task: dict[str, Any], odd: dict[str, Any], why: str, tmp_path: Path, cache: Path
) -> None:
    given = rows(12)
    given[1] |= odd
    with pytest.raises(ConfigError, match=why) as error:
        client_runtime(tiny_config(**keys(jsonl(tmp_path / "odd.jsonl", given), **of_task)))
    assert "\n" not in str(error.value)


def test_columns_of_known_targets_stand_in_their_order() -> None:
    table = pa.table({TARGETS: read_targets(Dataset.from_list(rows(3)), "size,stars", "regression", "'a'")})
    assert encode_targets([table], "size,stars", ("length", "score"), ["'a'"]) == (
        [table],
        ("length", "score"),
    )
    with pytest.raises(ConfigError, match="'size' at another place than in 'stars', 'size'"):
        encode_targets([table], "size,stars", ("stars", "size"), ["'a'"])
    with pytest.raises(ConfigError, match="names 2 columns, must be 1, for 'stars'"):
        encode_targets([table], "size,stars", ("stars",), ["'a'"])


def test_lists_are_all_lists_of_known_classes(tmp_path: Path, cache: Path) -> None:
    classes = Features({"tags": List(ClassLabel(names=["even", "fine"]))})
    table = Dataset.from_dict({"tags": [[0], [1, None]]}, features=classes)
    with pytest.raises(ConfigError, match="row 2 of 'a' holds NoneType null, which is none of its 2 classes"):
        read_targets(table, "tags", "multi_label_classification", "'a'")
    train = [row | {"tags": 1} for row in rows(12)]
    given = keys(jsonl(tmp_path / "a.jsonl", train), **{"data.test": jsonl(tmp_path / "b.jsonl", rows(4))})
    with pytest.raises(ConfigError, match=r"lists of names in some of .*, 0 and 1 in others"):
        client_runtime(tiny_config(**given, **LABELS))


def test_labels_that_training_does_not_know(tmp_path: Path, cache: Path) -> None:
    test = rows(4)
    test[2]["tags"] = ["new"]
    more = {"data.test": jsonl(tmp_path / "test.jsonl", test)}
    with pytest.raises(ConfigError, match="holds 'new' in row 3, known are 2 labels: 'even', 'fine'"):
        client_runtime(tiny_config(**keys(jsonl(tmp_path / "a.jsonl", rows()), **LABELS, **more)))


def test_the_best_round_knows_which_way_is_better(tmp_path: Path) -> None:
    records = [
        {"round": n, "loss": 1.0, "rmse": e, "r2": 1 - e, "f1_macro": e}
        for n, e in ((1, 0.5), (2, 0.3), (3, 0.9))
    ]
    for metric, task, best in (("rmse", REGRESSION, 2), ("r2", REGRESSION, 2), ("f1_macro", LABELS, 3)):
        config = tiny_config(**task, **{"metric-for-best-model": metric, "load-best-model-at-end": True})
        check(config)
        assert best_round(config, records) == best
    with pytest.raises(
        ConfigError, match=r"^metric-for-best-model = 'accuracy': task regression has loss, rmse, mae, r2$"
    ):
        check(tiny_config(**REGRESSION, **{"metric-for-best-model": "accuracy"}))
    with pytest.raises(ConfigError, match=r"task classification has loss, accuracy$"):
        check(tiny_config(**{"metric-for-best-model": "r2"}))
    with pytest.raises(NotApplicable, match="stays at clients, which tell hits and losses"):
        check(tiny_config(**REGRESSION, **{"strategy.name": "fedsa"}))
    with pytest.raises(NotApplicable, match="task regression has no sequences to pack"):
        check(tiny_config(**REGRESSION, **{"train.packing": True}))


def test_a_label_is_given_above_a_probability_of_one_half() -> None:
    outputs, targets = torch.tensor([[0.1, -0.1], [3.0, 0.2]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    units, right = MultiLabelClassification().hits(outputs, targets)
    assert (units.tolist(), right.tolist()) == ([2, 2], [2, 1])
