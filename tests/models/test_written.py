"""What is written is what PEFT loads: names that end alike, the same bytes, nothing where it would not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

import fedlora.models.export
from fedlora.core.factors import AdapterSet, LoraFactors
from fedlora.errors import RunFailed
from fedlora.models.export import write_adapter
from fedlora.models.peft_files import read_adapter

NESTED = ("proj", "attn.proj", "layers.1", "layers.11", "deep.layers.1", "layersx1")


def model_of(*names: str) -> nn.Module:
    root = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(last, nn.Linear(5, 6))
    return root


def factors(*names: str) -> AdapterSet:
    """A rank and a scaling of its own for each name."""
    g = torch.Generator().manual_seed(0)
    return {
        name: LoraFactors(torch.randn(r, 5, generator=g), torch.randn(6, r, generator=g), 0.5 * r)
        for r, name in enumerate(names, start=1)
    }


def changes(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("adapted", [NESTED, NESTED[::-1], ("proj",), ("layers.1",), ("layers.11", "proj")])
def test_names_that_end_alike_are_told_apart(adapted: tuple[str, ...], tmp_path: Path) -> None:
    wanted = factors(*adapted)
    write_adapter(tmp_path / "a", wanted, {}, None, base=model_of(*NESTED).to("meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT's about keys that are missing
        found = changes(PeftModel.from_pretrained(model_of(*NESTED), tmp_path / "a", torch_device="cpu"))
    assert found.keys() == wanted.keys()
    for name, f in wanted.items():
        torch.testing.assert_close(found[name], f.delta())
    again = read_adapter(tmp_path / "a").adapters
    assert {name: (f.rank, f.scaling) for name, f in again.items()} == {
        name: (f.rank, f.scaling) for name, f in wanted.items()
    }


def test_the_configuration_does_not_depend_on_the_order_of_a_set(tmp_path: Path) -> None:
    names = tuple(f"layers.{k}.proj" for k in range(20))
    adapters = factors(*names)
    write_adapter(tmp_path / "a", adapters, {}, None)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["target_modules"] == sorted(names)
    assert list(fields) == sorted(fields)


@pytest.mark.parametrize("wrong", ["a rank", "a scaling", "a name"])
def test_what_peft_would_load_otherwise_is_not_written(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fedlora.models.export.peft_config

    def spoiled(adapters: AdapterSet, head: dict[str, torch.Tensor], **fields: object) -> object:
        config = whole(adapters, head, **fields)
        patterns = {"a rank": config.rank_pattern, "a scaling": config.alpha_pattern, "a name": {}}[wrong]
        for name in patterns:
            patterns[name] += 1
        return config

    monkeypatch.setattr(fedlora.models.export, "peft_config", spoiled)
    base = model_of("layers.2", "layers.3").to("meta") if wrong == "a name" else None
    with pytest.raises(RunFailed, match="PEFT does not load what was to be written"):
        write_adapter(tmp_path / "a", factors("layers.1", "layers.2"), {}, None, base=base)
    assert list(tmp_path.iterdir()) == []
