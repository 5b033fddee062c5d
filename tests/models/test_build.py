"""The base: deterministic, frozen, and refused in one line when it cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, T5Config, T5Model

from fedlora.assets.fetch import is_cached
from fedlora.config import ModelConfig
from fedlora.errors import ConfigError
from fedlora.models import build_model, check_padding, head_tensors, pick_device
from tests.models.samples import logits, token_batch

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def weights(pooling: str, seed: int, name: str = "tiny") -> dict[str, torch.Tensor]:
    return dict(build_model(ModelConfig(name=name, pooling=pooling), 3, seed).state_dict())


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_only_the_head_depends_on_the_seed(pooling: str) -> None:
    one, again, other = weights(pooling, 1), weights(pooling, 1), weights(pooling, 2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert {name for name in one if not torch.equal(one[name], other[name])} == {"classifier.weight"}


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_the_global_random_state_is_left_alone(pooling: str) -> None:
    before = torch.get_rng_state()
    weights(pooling, 1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_the_base_is_frozen_float32_and_in_evaluation_mode(pooling: str) -> None:
    model = build_model(ModelConfig(name="tiny", pooling=pooling), 3, 0)
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(module.training for module in model.modules())


def test_mean_pooling_is_the_mean_over_the_attention_mask() -> None:
    model = build_model(ModelConfig(name="tiny"), 3, 0)
    batch = token_batch()
    with torch.no_grad():
        states = model.backbone(**batch).last_hidden_state
    means = torch.stack(
        [s[: int(m.sum())].mean(dim=0) for s, m in zip(states, batch["attention_mask"], strict=True)]
    )
    torch.testing.assert_close(logits(model, batch), model.classifier(means), atol=1e-6, rtol=1e-5)


def test_padding_does_not_change_the_logits() -> None:
    model = build_model(ModelConfig(name="tiny"), 3, 0)
    batch = token_batch()
    longer = {name: torch.nn.functional.pad(t, (0, 7)) for name, t in batch.items()}
    torch.testing.assert_close(logits(model, batch), logits(model, longer), atol=1e-6, rtol=1e-5)


def test_the_loss_is_the_mean_cross_entropy() -> None:
    model = build_model(ModelConfig(name="tiny"), 3, 0)
    labels = torch.tensor([0, 1, 2, 0, 1])
    out = model(**token_batch(), labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))


def test_weights_that_a_checkpoint_lacks_come_from_the_seed(tmp_path: Path) -> None:
    BertModel(BertConfig(**SMALL), add_pooling_layer=False).save_pretrained(tmp_path)
    one, again, other = (weights("model", seed, str(tmp_path)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["bert.pooler.dense.weight"], other["bert.pooler.dense.weight"])


def test_a_head_that_the_checkpoint_brings_is_kept(tmp_path: Path) -> None:
    trained = BertForSequenceClassification(BertConfig(**SMALL, num_labels=3))
    trained.save_pretrained(tmp_path)
    assert torch.equal(weights("model", 5, str(tmp_path))["classifier.weight"], trained.classifier.weight)


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_a_decoder_takes_padded_batches(gpt2: Path, pooling: str) -> None:
    model = build_model(ModelConfig(name=str(gpt2), pooling=pooling), 3, 0)
    assert logits(model, token_batch(vocabulary=200)).shape == (5, 3)
    assert set(head_tensors(model)) == (
        {"classifier.weight", "classifier.bias"} if pooling == "mean" else {"score.weight"}
    )


def test_a_head_that_looks_for_another_padding_token_is_refused(gpt2: Path) -> None:
    config = ModelConfig(name=str(gpt2), pooling="model")
    model = build_model(config, 3, 0)
    pads: Any = model.config
    check_padding(config, model, pads.pad_token_id)
    with pytest.raises(ConfigError, match="its tokenizer pads with 7"):
        check_padding(config, model, 7)
    mean = ModelConfig(name=str(gpt2), pooling="mean")
    check_padding(mean, build_model(mean, 3, 0), 7)


def test_an_encoder_decoder_has_no_mean(tmp_path: Path) -> None:
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.name = .* t5 has no single sequence"):
        build_model(ModelConfig(name=str(tmp_path)), 2, 0)


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "{empty}"])
def test_a_model_that_cannot_be_had_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = name.format(empty=tmp_path)
    with pytest.raises(ConfigError) as error:
        build_model(ModelConfig(name=name), 2, 0)
    assert str(error.value).startswith(f"model.name = {name!r}: accepted are minilm, tiny, ")
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    if not torch.backends.mps.is_available():
        with pytest.raises(
            ConfigError, match=r"engine\.device = 'mps': not available here, accepted are auto"
        ):
            pick_device("mps")


@pytest.mark.real
@pytest.mark.skipif(not is_cached("minilm"), reason="minilm is not in the cache")
def test_minilm_tells_related_sentences_from_others() -> None:
    from transformers import AutoTokenizer

    from fedlora.assets.fetch import asset_path

    tokenizer = AutoTokenizer.from_pretrained(asset_path("minilm"))
    model = build_model(ModelConfig(name="minilm"), 2, 0)
    texts = ["a cat sits on the mat", "a kitten is sitting on a rug", "interest rates rose again in March"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.backbone(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    similar = pooled @ pooled.T
    assert similar[0, 1] > 0.5 > 0.2 > similar[0, 2]
