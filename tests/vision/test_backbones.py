"""Backbones are transformers models that LoRA can adapt, with a head drawn like every other head."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import gelu
from transformers import AutoModelForImageClassification, BertConfig

from fedlora.core.init_drawn import HEAD_STD
from fedlora.data.image_reader import PRETRAINED, SIZES, TINY, image_format
from fedlora.errors import ConfigError
from fedlora.models import AdaptedModel, head_tensors, linear_layers, resolve_targets
from fedlora.models.vision.backbones import fresh_classifier, image_classifier
from fedlora.models.vision.mixer import MlpMixerConfig, MlpMixerForImageClassification

X = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_has_the_same_backbone_and_another_head_for_each_seed(name: str) -> None:
    before = torch.get_rng_state()
    one, again, other = (image_classifier(name, 5, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for key, tensor in one.items():
        assert torch.equal(tensor, again[key])
        assert torch.equal(tensor, other[key]) == (key != "classifier.weight"), key
    assert one["classifier.weight"].std().item() == pytest.approx(HEAD_STD, rel=0.3)
    assert not one["classifier.bias"].any()


@pytest.mark.parametrize("name", TINY)
def test_it_is_frozen_and_answers_with_logits(name: str) -> None:
    model = image_classifier(name, 5, 0)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model(pixel_values=X).logits.shape == (3, 5)
    assert list(head_tensors(model)) == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("name", TINY)
def test_every_default_target_takes_an_adapter_that_learns(name: str) -> None:
    model = image_classifier(name, 5, 0)
    names = resolve_targets(model, "")
    assert len(names) == 2 * (2 if name == "tiny-vit" else 4)
    adapted = AdaptedModel(model, names)
    assert set(adapted.modules) == set(names)


@pytest.mark.parametrize("kind", SIZES)
def test_peft_wraps_and_trains_it(kind: str) -> None:
    model = fresh_classifier(kind, TINY[f"tiny-{kind}"], 5)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=list(linear_layers(model)), lora_dropout=0.0))
    peft(pixel_values=X, labels=torch.tensor([0, 1, 2])).loss.backward()
    gradients = [p.grad for n, p in peft.named_parameters() if "lora_B" in n]
    assert gradients
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_the_mixer_is_equation_one_of_its_paper() -> None:
    config = MlpMixerConfig(**TINY["tiny-mixer"], num_labels=5)
    model = MlpMixerForImageClassification(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    w = model.state_dict()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        inner = gelu(x @ w[f"{name}.fc1.weight"].T + w[f"{name}.fc1.bias"])
        return inner @ w[f"{name}.fc2.weight"].T + w[f"{name}.fc2.bias"]

    image = X[0, 0].double()
    rows = [image[i : i + 7, j : j + 7].reshape(-1) for i in range(0, 28, 7) for j in range(0, 28, 7)]
    x = torch.stack(rows) @ w["mixer.stem.weight"].reshape(16, 49).T + w["mixer.stem.bias"]
    for layer in range(2):
        place = f"mixer.layers.{layer}"
        x = x + mlp(norm(x, f"{place}.norm_tokens").T, f"{place}.token_mixing").T
        x = x + mlp(norm(x, f"{place}.norm_channels"), f"{place}.channel_mixing")
    mean = norm(x, "mixer.layernorm").mean(0)
    expected = mean @ w["classifier.weight"].T + w["classifier.bias"]
    torch.testing.assert_close(model(pixel_values=X[:1].double()).logits[0], expected)


def test_the_mixer_is_found_by_transformers(tmp_path: Path) -> None:
    model = image_classifier("tiny-mixer", 5, 0)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again.eval()(pixel_values=X).logits, model(pixel_values=X).logits)


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_backbone_that_is_not_there_names_its_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    kind, data = PRETRAINED[name]
    with pytest.raises(ConfigError, match=f"fedlora pretrain {kind} --data {data}$") as caught:
        image_classifier(name, 10, 0)
    assert "\n" not in str(caught.value)


def test_a_directory_of_ones_own_keeps_a_head_that_fits_and_draws_another(tmp_path: Path) -> None:
    image_classifier("tiny-vit", 5, 3).save_pretrained(tmp_path)  # type: ignore[operator]
    kept = image_classifier(str(tmp_path), 5, 0)
    assert torch.equal(kept(pixel_values=X).logits, image_classifier("tiny-vit", 5, 3)(pixel_values=X).logits)
    one, again, other = (image_classifier(str(tmp_path), 7, seed) for seed in (0, 0, 1))
    assert one(pixel_values=X).logits.shape == (3, 7)
    assert torch.equal(one(pixel_values=X).logits, again(pixel_values=X).logits)
    assert not torch.equal(one(pixel_values=X).logits, other(pixel_values=X).logits)


def test_the_preprocessor_of_a_directory_is_read(tmp_path: Path) -> None:
    image_classifier("tiny-vit", 5, 3).save_pretrained(tmp_path)  # type: ignore[operator]
    assert image_format(str(tmp_path)) == image_format("tiny-vit")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1], "image_std": [0.3]}))
    form = image_format(str(tmp_path))
    assert (form.size, form.channels, form.mean, form.std) == (28, 1, (0.1,), (0.3,))


@pytest.mark.parametrize("name", ["no/such-model", "text"])
def test_what_is_no_image_model_is_one_line(name: str, tmp_path: Path) -> None:
    if name == "text":
        BertConfig().save_pretrained(tmp_path)
        name = str(tmp_path)
    for function in (image_format, lambda name: image_classifier(name, 3, 0)):
        with pytest.raises(ConfigError, match=r"model\.name") as caught:
            function(name)
        assert "\n" not in str(caught.value)


def test_names_and_sizes_fit_together() -> None:
    assert PRETRAINED["vit"] == ("vit", "digits")
    assert PRETRAINED["mixer-fashion-mnist"] == ("mixer", "fashion-mnist")
    for kind, sizes in SIZES.items():
        model = fresh_classifier(kind, sizes, 10)
        assert np.prod(model(pixel_values=X).logits.shape) == 30
