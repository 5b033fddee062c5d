"""Image classification from end to end: data, training one by one, in cohorts and privately, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fedlora.cli import cli
from fedlora.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from fedlora.data.examples import Examples, collate
from fedlora.data.images import ImageData, ImageFormat
from fedlora.errors import ConfigError
from fedlora.evaluation.adapter import evaluate_adapter
from fedlora.models import AdaptedModel, build_model, resolve_targets
from fedlora.models.export import load_adapter
from fedlora.prepared.cache import open_prepared, prepare
from fedlora.simulation.simulate import simulate
from fedlora.tasks import task_named
from fedlora.tasks.images import ImageReader
from tests.clients.cohort.samples import assert_same, member, privately, task
from tests.clients.samples import BOTH, train_by_dp_sgd
from tests.conftest import tiny_config
from tests.models.samples import random_adapters
from tests.vision.samples import shaded

TASK = task_named("image-classification")
models = pytest.mark.parametrize("name", ["tiny-vit", "tiny-mixer"])


def adapted(name: str) -> AdaptedModel:
    module = build_model(ModelConfig(name=name), 4, 0, TASK.network)
    return AdaptedModel(module, resolve_targets(module, ""), TASK)


def synthetic_examples(number: int = 60) -> Examples:
    images = shaded(number)
    form = ImageFormat(size=28, channels=1, mean=(0.5,), std=(0.5,), tokens=16)
    return Examples(
        tokens=images.pixels.reshape(-1), offsets=np.arange(number + 1) * 784, labels=images.labels,
        domains=images.domains, image=form,
    )  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """120 pictures in a folder for each label."""
    images = shaded(120)
    for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        folder = tmp_path / "pictures" / "train" / f"shade-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[0]).save(folder / f"{number}.png")
    return str(tmp_path / "pictures")


def image_config(name: str, data: str, **overrides: Any) -> RunConfig:
    keys = {
        "task": "image-classification",
        "model.name": name,
        "data.name": data,
        "data.partitioner": "dirichlet",
        "data.num-partitions": 3,
        "data.dirichlet-alpha": 5.0,
        "train.learning-rate": 0.02,
        "train.local-steps": 10,
        "train.batch-size": 16,
    }
    return tiny_config(**{**keys, **overrides})


def test_batches_are_the_pictures(cache: Path, pictures: str) -> None:
    data = open_prepared(prepare(image_config("tiny-vit", pictures)))
    assert (data.label_names, data.num_partitions) == (tuple(f"shade-{k}" for k in range(4)), 3)
    batch = collate(data.train, [0, 1, 2], data.pad_token_id)
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (3, 1, 28, 28)
    brightness = batch["pixel_values"].mean(dim=(1, 2, 3)) * 0.5 + 0.5
    shade = (brightness * 255 - 20) / 70
    assert torch.equal(shade.round().long(), batch["labels"])
    assert data.train.lengths_of(np.arange(2)).tolist() == [16, 16]


def test_built_in_pictures_have_a_validation_part_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = shaded(120)
    train, test = images.take(np.arange(90)), images.take(np.arange(90, 120))
    made = ImageData(train, test, ("a", "b", "c", "d"), ())
    monkeypatch.setattr("fedlora.data.builtin.image_sets.built_in_images", lambda *_: made)
    form = ImageReader(ImageFormat(size=28, channels=1, mean=(0.5,), std=(0.5,)))
    whole = TASK.load(DataConfig(name="digits"), form)
    tuned = TASK.load(DataConfig(name="digits", validation_fraction=0.2), form)
    before, after, held = (set(t["image"][:]) for t in (whole.train, tuned.train, tuned.test))
    assert (len(whole.test), len(tuned.test)) == (30, 18)
    assert held | after == before
    assert not held & after


@models
@pytest.mark.parametrize("strategy", ["fedavg", "flora"])
def test_a_run_learns_and_its_adapter_loads_in_peft(
    name: str, strategy: str, cache: Path, pictures: str, tmp_path: Path
) -> None:
    config = image_config(name, pictures, **{"strategy.name": strategy})
    result = simulate(config, tmp_path / "run")
    assert result["accuracy"] > 0.4, "chance is a quarter"
    _, card = load_adapter(tmp_path / "run" / "adapter")
    assert card.task == TASK.name
    again = evaluate_adapter(tmp_path / "run" / "adapter", pictures, text_column="text", label_column="label")
    assert again["accuracy"] == result["accuracy"]


@models
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_cohort_trains_as_one_by_one(name: str, private: bool) -> None:
    model = adapted(name)
    model.module.to(torch.float64)
    data = synthetic_examples()
    members = [member(model, 0, steps=2), member(model, 1, rank=2, size=7, steps=3)]
    assert_same(model, privately(members) if private else members, task(data, dropout=0.2))


@models
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_private_training_passes_its_self_test(name: str, mode: str) -> None:
    model = adapted(name)
    model.load(random_adapters(model.modules, 2), {}, trained=BOTH, train_head=True)
    train_by_dp_sgd(
        model, synthetic_examples(), np.arange(24), 0, TrainConfig(batch_size=4), local_steps=1,
        noise_multiplier=1.0, max_grad_norm=1.0, seed=0, grad_sample_mode=mode,
    )  # fmt: skip


def test_targets_are_query_and_value_or_the_perceptrons() -> None:
    wanted = {"tiny-vit": {"q_proj", "v_proj"}, "tiny-mixer": {"fc1", "fc2"}}
    for name, endings in wanted.items():
        assert {module.rpartition(".")[2] for module in adapted(name).modules} == endings


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model.name": "minilm"}, "accepted for images are vit"),
        ({"data.name": "synthetic"}, "image-column = 'image': no such column of images"),
        ({"data.image-column": "photo"}, "image-column = 'photo': no such column of images"),
        (
            {"task": "classification", "model.name": "tiny", "data.name": "digits"},
            "holds pictures, use task = 'image-classification'",
        ),
    ],
)
def test_what_is_no_image_task_is_refused(
    keys: dict[str, Any], says: str, cache: Path, pictures: str
) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        prepare(image_config("tiny-vit", pictures, **keys))
    assert "\n" not in str(refused.value)


def test_the_probe_is_a_command(cache: Path, pictures: str, tmp_path: Path) -> None:
    config = tmp_path / "own.toml"
    data = f'[data]\nname = "{pictures}"\npartitioner = "iid"\nnum-partitions = 2\n'
    config.write_text(f'task = "image-classification"\n[model]\nname = "tiny-vit"\n{data}')
    result = CliRunner().invoke(cli, ["probe", str(config)])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("linear probe of tiny-vit: accuracy ")  # a folder names no domains
    assert float(result.stdout.split()[-2]) > 75.0  # shades show in any features
    assert "LOAD REPORT" not in result.stderr


def test_the_probe_of_a_text_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "text.toml"
    config.write_text('[model]\nname = "tiny"\n')
    result = CliRunner().invoke(cli, ["probe", str(config)])
    assert result.exit_code == 2
    assert "task = 'classification': fedlora probe is for 'image-classification'" in result.stderr
