"""Pretraining: the same bits on any number of cores, and a directory that says what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from fedlora.cli import cli
from fedlora.core import parallel
from fedlora.data.builtin.image_sets import NATIVE, Parts
from fedlora.data.image_reader import TINY
from fedlora.data.images import image_batch
from fedlora.errors import ConfigError, RunFailed
from fedlora.models.vision import pretraining
from fedlora.models.vision.backbones import fresh_classifier, image_classifier
from fedlora.models.vision.pretraining import Recipe, pretrain, read_facts, shifted, trained
from tests.vision.samples import shaded

RECIPE = Recipe(steps=60, batch_size=16, warmup=4, shift=0, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny backbones, a made-up image set, a cache of its own."""
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    for kind in ("vit", "mixer"):
        monkeypatch.setitem(pretraining.SIZES, kind, TINY[f"tiny-{kind}"])
        monkeypatch.setitem(pretraining.RECIPES, kind, RECIPE)
    monkeypatch.setattr(
        pretraining, "image_parts", lambda _: Parts(shaded(160), shaded(8, seed=1), shaded(8, seed=2))
    )


@pytest.mark.parametrize("kind", ["vit", "mixer"])
def test_it_learns_and_is_found_again_with_a_new_head(kind: str) -> None:
    home, facts = pretrain(kind, "digits")
    assert facts.accuracy > 0.9
    assert (facts.images, facts.held_out) == (144, 16)
    model = image_classifier(kind, 10, 0)
    whole, _ = trained(kind, "digits", shaded(160), RECIPE, iter)
    for name, tensor in whole.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(model.state_dict()[name], tensor), name
    assert model.classifier.out_features == 10  # type: ignore[union-attr]
    assert facts.parameters == sum(t.numel() for n, t in whole.named_parameters() if "classifier" not in n)
    assert read_facts(home) == facts


def test_only_the_part_for_pretraining_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[bytes] = set()
    batch = pretraining.image_batch

    def watched(images, *rest):  # type: ignore[no-untyped-def]
        seen.update(image.tobytes() for image in images.pixels)
        return batch(images, *rest)

    monkeypatch.setattr(pretraining, "image_batch", watched)
    pretrain("mixer", "digits")
    assert seen == {image.tobytes() for image in shaded(160).pixels}


def test_the_bits_do_not_depend_on_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (1, 2, 4):
        monkeypatch.setattr(parallel.os, "cpu_count", lambda cores=cores: cores)
        model, _ = trained("mixer", "digits", shaded(80), RECIPE, iter)
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name])
        assert torch.equal(tensor, found[2][name])


def test_shards_together_are_the_batch() -> None:
    """One plain step of SGD-like gradients on the whole batch gives the same sum."""
    images = shaded(16)
    model = fresh_classifier("mixer", TINY["tiny-mixer"], 4)
    parts = [images.take(rows) for rows in np.array_split(np.arange(16), 3)]
    shards = [pretraining._gradient(pretraining._sharing(model), part, 16) for part in parts]
    batch = image_batch(images, range(16), NATIVE)
    cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"]).backward()
    for parameter, *gradients in zip(model.parameters(), *shards, strict=True):
        torch.testing.assert_close(sum(gradients), parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_replica_sees_every_step_of_the_model() -> None:
    model = fresh_classifier("vit", TINY["tiny-vit"], 4)
    replica = pretraining._sharing(model)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, shared)


def test_images_move_down_and_right_and_black_comes_in() -> None:
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 1, 3, 3)
    moved = shifted(np.concatenate([image] * 3), np.array([[0, 0], [1, 0], [-1, 2]]))
    np.testing.assert_array_equal(moved[0], image[0])
    assert moved[1, 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert moved[2, 0].tolist() == [[0, 0, 4], [0, 0, 7], [0, 0, 0]]


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    home, facts = pretrain("mixer", "digits")
    card = (home / "README.md").read_text()
    assert "Not an off-the-shelf model" in card
    assert f"{facts.accuracy:.4f}" in card
    assert "no client trains on and no test contains" in card
    assert str(tmp_path) not in card


def test_a_training_that_goes_astray_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(pretraining.RECIPES, "vit", Recipe(steps=2, warmup=1, learning_rate=0.0))
    with pytest.raises(RunFailed, match="accuracy"):
        pretrain("vit", "digits")
    assert not [path for path in (tmp_path / "backbones").iterdir() if path.is_dir()]


@pytest.mark.parametrize(("kind", "data"), [("resnet", "digits"), ("vit", "cifar")])
def test_unknown_names_are_refused(kind: str, data: str) -> None:
    with pytest.raises(ConfigError, match=r"accepted are (vit, mixer|digits, fashion-mnist)"):
        pretrain(kind, data)


def test_the_command_refuses_in_one_line() -> None:
    done = CliRunner().invoke(cli, ["pretrain", "resnet"])
    assert done.exit_code == 2
    assert " ".join(done.output.split()) == "error: KIND = 'resnet': accepted are vit, mixer"


def test_the_command_makes_it_once_and_names_it() -> None:
    first, again = (CliRunner().invoke(cli, ["pretrain", "mixer"]) for _ in range(2))
    assert first.exit_code == again.exit_code == 0
    assert 'model.name = "mixer"' in first.stdout
    assert "60 steps" in first.output
    assert "60 steps" not in again.output
