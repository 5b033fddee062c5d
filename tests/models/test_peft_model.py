"""Arrays of any rank in somebody's PEFT model: what it computes, what it writes, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.core.peft_keys import key_of
from fedlora.errors import ConfigError, FactorShapeError
from fedlora.models.arrays import load_arrays, save_arrays


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 5)
        self.inner = nn.ModuleDict({"q": nn.Linear(5, 4)})
        self.turned = Conv1D(7, 4)
        self.score = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.turned(self.inner["q"](self.q(x))))


class Network(nn.Module):
    """Layers whose names end alike: ``q``, ``block.q``, ``block.inner.q``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.block = nn.Linear(6, 6), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.q(x))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.q = nn.Embedding(5, 6), nn.Linear(6, 6)


SHAPES = {"q": (6, 6), "block.q": (5, 6), "block.inner.q": (4, 5), "block.turned": (7, 4)}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def network(**options: Any) -> PeftModel:
    own = {"r": 2, "lora_alpha": 6, "target_modules": ["q", "turned"], **options}
    return get_peft_model(Network(), LoraConfig(**own, modules_to_save=["score"])).eval()


def state_dict(ranks: dict[str, int], seed: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (o, i) in SHAPES.items():
        tensors[key_of(name, "A")] = torch.randn(ranks[name], i, generator=g)
        tensors[key_of(name, "B")] = torch.randn(o, ranks[name], generator=g)
    head = {"weight": torch.randn(2, 7, generator=g), "bias": torch.randn(2, generator=g)}
    return tensors | {f"base_model.model.block.score.{k}": v for k, v in head.items()}


def dense(tensors: dict[str, Tensor], scalings: dict[str, float]) -> Tensor:
    """The plain network with ``W_0 + s B A`` in its weights."""
    model = Network().eval()
    for name in SHAPES:
        layer = model.get_submodule(name)
        delta = scalings[name] * tensors[key_of(name, "B")] @ tensors[key_of(name, "A")]
        layer.weight.data = layer.weight.data + (delta.T if isinstance(layer, Conv1D) else delta)
    for kind in ("weight", "bias"):
        getattr(model.block.score, kind).data = tensors[f"base_model.model.block.score.{kind}"]
    return model(X).detach()


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "plain": ({}, dict.fromkeys(SHAPES, 3.0)),
    "rslora": ({"r": 4, "lora_alpha": 8, "use_rslora": True}, dict.fromkeys(SHAPES, 4.0)),
    "patterns": (
        {"rank_pattern": {"block.q": 1}, "alpha_pattern": {"turned": 8}},
        {"q": 3.0, "block.q": 6.0, "block.inner.q": 3.0, "block.turned": 4.0},
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(ranks=st.tuples(*[st.integers(1, 9)] * 4))
def test_any_ranks_load_at_the_models_own_scalings_and_reload_from_a_directory(
    case: str, ranks: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """PEFT's forward pass is the dense one, before and after ``save_pretrained``, for any names."""
    options, scalings = CONFIGS[case]
    tensors = state_dict(dict(zip(SHAPES, ranks, strict=True)))
    directory = tmp_path_factory.mktemp("adapter")
    model, wanted = network(**options), dense(tensors, scalings)
    save_arrays(model, ArrayRecord({n: Array(t.numpy()) for n, t in tensors.items()}), directory)
    torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-3)
    again = PeftModel.from_pretrained(Network(), str(directory)).eval()
    torch.testing.assert_close(again(X), wanted, rtol=1e-4, atol=1e-3)


def test_arrays_that_torch_and_numpy_saved_are_the_same(tmp_path: Path) -> None:
    tensors = state_dict(dict.fromkeys(SHAPES, 5))
    record = ArrayRecord({n: Array(t.numpy()) for n, t in tensors.items()})
    torch.save(record.to_torch_state_dict(), tmp_path / "arrays.pt")
    np.savez(tmp_path / "arrays.npz", **{n: a.numpy() for n, a in record.items()})
    outputs = []
    for arrays in (record, torch.load(tmp_path / "arrays.pt"), dict(np.load(tmp_path / "arrays.npz"))):
        model = network()
        load_arrays(model, arrays)
        outputs.append(model(X))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_resized_model_trains_on_and_takes_the_next_arrays() -> None:
    model = network()
    for rank in (5, 2, 3):
        load_arrays(model, state_dict(dict.fromkeys(SHAPES, rank)))
        assert {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n} == {rank}
        assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
        model(X).sum().backward()
    assert get_peft_model_state_dict(model)[key_of("q", "A")].shape == (3, 6)


def test_what_a_model_has_no_place_for_is_refused_by_name() -> None:
    tensors = state_dict(dict.fromkeys(SHAPES, 2))
    with pytest.raises(FactorShapeError, match=r"the unknown module block\.k"):
        load_arrays(network(), {**tensors, key_of("block.k", "A"): X, key_of("block.k", "B"): X.T})
    with pytest.raises(FactorShapeError, match=r"lacks module q"):
        load_arrays(network(), {n: t for n, t in tensors.items() if ".model.q." not in n})
    with pytest.raises(FactorShapeError, match=r"module q has only some of its factors"):
        load_arrays(network(), {n: t for n, t in tensors.items() if n != key_of("q", "B")})
    with pytest.raises(ConfigError, match=r"block\.other"):
        load_arrays(network(), {**tensors, "base_model.model.block.other.weight": X})
    with pytest.raises(ConfigError, match="Network: not a PeftModel"):
        load_arrays(Network(), tensors)  # type: ignore[arg-type]
    for more in ({"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(ConfigError, match=r"q: only plain LoRA can be federated"):
            load_arrays(network(**more), tensors)
    with pytest.raises(ConfigError, match=r"words: only linear layers can be federated, not Embedding"):
        load_arrays(get_peft_model(Words(), LoraConfig(target_modules=["words", "q"])), tensors)
    merged = network()
    merged.merge_adapter()
    with pytest.raises(ConfigError, match="merged"):
        load_arrays(merged, tensors)
