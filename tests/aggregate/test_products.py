"""What is written is what the method promises, by PEFT's own reading of the adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.core.factors import PLAIN
from fedlora.core.sealed import read_sealed, sealed
from fedlora.models.export import load_adapter as load_exported
from fedlora.models.export import save_adapter as export
from strategies.registry import RULES, make_rule
from tests.aggregate.saved import (
    FAMILIES,
    aggregate,
    assert_close,
    deltas,
    edit_config,
    loaded,
    mean_delta,
    refused,
    save_adapter,
)
from tests.models.samples import adapted
from tests.models.test_export import card_of, state_of

pytestmark = pytest.mark.slow

WEIGHTS, P = "3,1,4", (3 / 8, 1 / 8, 4 / 8)


def takes_adapters(name: str) -> bool:
    rule = make_rule(name)
    return not rule.facts.own_models and "B" in rule.shipped(1) and rule.trained(1) <= PLAIN


def freezes_a(name: str) -> bool:
    return "A" not in make_rule(name).trained(1)


USABLE = [name for name in RULES if takes_adapters(name)]
EXACT = [name for name in USABLE if RULES[name].facts.exact]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [n for n in EXACT if RULES[n].facts.mixed_ranks and not freezes_a(n)])
def test_exact_methods_write_the_mean_update_of_mixed_adapters(
    name: str, family: str, bases: Mapping[str, Path], mixed: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    result = aggregate("--strategy", name, "--weights", WEIGHTS, "--out", tmp_path / "out", *mixed[family])
    assert result.exit_code == 0, result.output
    expected = mean_delta(family, bases[family], mixed[family], P)
    assert_close(deltas(loaded(family, bases[family], tmp_path / "out")), expected)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_write_the_mean_update_of_adapters_that_share_a(
    name: str, bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    result = aggregate("--strategy", name, "--weights", WEIGHTS, "--out", tmp_path / "out", *alike["gpt2"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(bases["gpt2"]), "CAUSAL_LM")
    assert config["fan_in_fan_out"] is True
    expected = mean_delta("gpt2", bases["gpt2"], alike["gpt2"], P)
    assert_close(deltas(loaded("gpt2", bases["gpt2"], tmp_path / "out")), expected)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_carried_out_or_refused_in_one_line(
    name: str, alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    result = aggregate("--strategy", name, "--json", "--out", tmp_path / "out", *alike["llama"])
    if name in USABLE:
        found = json.loads(result.stdout)
        assert found["strategy"] == name
        assert found["ranks_in"] == [[4], [4], [4]]
        assert found["diagnostics"]["gap"] < 1e-5 or not RULES[name].facts.exact
    else:
        facts, trained = RULES[name].facts, make_rule(name).trained(1)
        own = "keep" if facts.personal else "have an adapter each" if facts.by_client else ""
        why = own or ("train R" if trained - PLAIN else "send no B")
        refused(result, f"--strategy {name}: clients {why}")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [n for n in USABLE if freezes_a(n)])
def test_a_rule_that_freezes_a_refuses_adapters_of_different_a(
    name: str, bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    other = save_adapter(tmp_path / "other", "llama", bases["llama"], 5, shared_a=98, r=4)
    result = aggregate("--strategy", name, "--out", tmp_path / "out", alike["llama"][0], other)
    refused(result, "one frozen A that all share", "q_proj", str(other))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [n for n in USABLE if not RULES[n].facts.mixed_ranks])
def test_a_rule_without_mixed_ranks_names_who_has_what(
    name: str, mixed: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    result = aggregate("--strategy", name, "--out", tmp_path / "out", *mixed["llama"])
    refused(result, f"--strategy {name} needs equal ranks", "rank 5 in", "2 in", "flora")
    assert not (tmp_path / "out").exists()


def test_fedavg_writes_the_mean_of_each_factor(
    bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    other = save_adapter(tmp_path / "other", "llama", bases["llama"], 5, r=4, lora_alpha=2)
    both = [alike["llama"][0], other]
    assert aggregate("--strategy", "fedavg", "--weights=3,1", "--out", tmp_path / "o", *both).exit_code == 0
    first, second, mean = (load_file(d / "adapter_model.safetensors") for d in (*both, tmp_path / "o"))
    assert mean.keys() == first.keys()
    for key, tensor in mean.items():
        scale = 0.5 if "lora_B" in key else 1.0  # alphas 4 and 2: s_k / s is folded into B
        torch.testing.assert_close(tensor, 0.75 * first[key] + 0.25 * scale * second[key])


def test_a_module_that_one_adapter_lacks_is_a_change_of_zero_with_the_others_a(
    bases: Mapping[str, Path], tmp_path: Path
) -> None:
    saved = [
        save_adapter(tmp_path / f"{k}", "llama", bases["llama"], k, r=2, lora_alpha=2, target_modules=targets)
        for k, targets in enumerate((["q_proj"], ["q_proj", "v_proj"], ["v_proj"]))
    ]
    result = aggregate("--strategy", "fedavg", "--weights", WEIGHTS, "--out", tmp_path / "out", *saved)
    assert f"note: {saved[0]} lacks 2 of 4 modules: no change there, its weight stays" in result.stdout
    one, two, mean = (load_file(d / "adapter_model.safetensors") for d in (*saved[1:], tmp_path / "out"))
    held = [key for key in mean if "v_proj" in key]
    assert len(held) == 4
    for key in held:
        total = sum(P[1:]) if "lora_A" in key else 1.0  # A over those who have it, B over all
        torch.testing.assert_close(mean[key], (P[1] * one[key] + P[2] * two[key]) / total)


def test_heads_are_averaged_with_the_weights(
    bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    aggregate("--strategy", "fedex", "--weights", WEIGHTS, "--out", tmp_path / "out", *alike["bert"])
    key = "base_model.model.classifier.weight"
    heads = [load_file(d / "adapter_model.safetensors")[key] for d in alike["bert"]]
    expected = torch.stack([p * head for p, head in zip(P, heads, strict=True)]).sum(dim=0)
    out = loaded("bert", bases["bert"], tmp_path / "out")
    torch.testing.assert_close(out.base_model.model.classifier.modules_to_save["default"].weight, expected)


def test_a_module_that_is_trained_whole_stays_one(bases: Mapping[str, Path], tmp_path: Path) -> None:
    both = [
        save_adapter(
            tmp_path / f"{k}", "llama", bases["llama"], k, r=2, modules_to_save=["lm_head", "elsewhere"]
        )
        for k in range(2)
    ]
    aggregate("--strategy", "flora", "--out", tmp_path / "out", *both)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    heads = [
        loaded("llama", bases["llama"], d).base_model.model.lm_head.modules_to_save["default"].weight
        for d in (*both, tmp_path / "out")
    ]
    torch.testing.assert_close(heads[2], (heads[0] + heads[1]) / 2)


def test_the_order_of_the_adapters_does_not_matter(
    bases: Mapping[str, Path], mixed: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    a, b, c = mixed["gpt2"]
    aggregate("--strategy", "flora", "--weights=3,1,4", "--out", tmp_path / "one", a, b, c)
    aggregate("--strategy", "flora", "--weights=4,3,1", "--out", tmp_path / "two", c, a, b)
    one, two = (deltas(loaded("gpt2", bases["gpt2"], tmp_path / d)) for d in ("one", "two"))
    assert_close(one, two)


def test_weights_are_equal_if_left_out_and_one_of_zero_counts_for_nothing(
    bases: Mapping[str, Path], mixed: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    equal = aggregate("--strategy", "flora", "--out", tmp_path / "one", *mixed["llama"][:2])
    assert "equal weights (no --weights)" in equal.stdout
    aggregate("--strategy", "flora", "--weights=2,2,0", "--out", tmp_path / "two", *mixed["llama"])
    one, two = (deltas(loaded("llama", bases["llama"], tmp_path / d)) for d in ("one", "two"))
    assert_close({name: two[name] for name in one}, one)


def test_half_precision_factors_are_averaged_in_float32(
    bases: Mapping[str, Path], mixed: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    base, half = bases["llama"], save_adapter(tmp_path / "half", "llama", bases["llama"], 7, r=2)
    file = half / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    both = [half, mixed["llama"][0]]
    assert aggregate("--strategy", "flora", "--weights=1,2", "--out", tmp_path / "out", *both).exit_code == 0
    expected = mean_delta("llama", base, both, (1 / 3, 2 / 3))
    assert_close(deltas(loaded("llama", base, tmp_path / "out")), expected)


def test_an_option_reaches_the_rule(alike: Mapping[str, list[Path]], tmp_path: Path) -> None:
    gaps = [
        json.loads(
            aggregate(
                "--strategy", "florist", "--option", f"threshold={threshold}", "--json", "--out",
                tmp_path / "out", *alike["llama"],
            ).stdout
        )["diagnostics"]["gap"]
        for threshold in (0.5, 1.0)
    ]  # fmt: skip
    assert gaps[0] > 0.1 > 1e-5 > gaps[1]


def test_adapters_that_fedlora_wrote_stay_adapters_that_fedlora_reads(tmp_path: Path) -> None:
    model = adapted()
    for name in ("one", "two"):
        export(tmp_path / name, state_of("plain", model), {}, card_of("tiny"))
    both = (tmp_path / "one", tmp_path / "two")
    assert aggregate("--strategy", "flora", "--out", tmp_path / "out", *both).exit_code == 0
    module, card = load_exported(tmp_path / "out")
    assert card == card_of("tiny")
    assert_close(deltas(module), deltas(load_exported(tmp_path / "one")[0]))
    card_file = tmp_path / "two" / "fedlora.json"
    other = json.loads(json.dumps(read_sealed(card_file)).replace('"tiny"', '"minilm"'))
    card_file.write_text(json.dumps(sealed(other)))
    refused(aggregate("--strategy", "flora", "--out", tmp_path / "no", *both), "different base", "minilm")


def test_another_name_of_the_base_needs_base(
    bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    other = save_adapter(tmp_path / "other", "llama", bases["llama"], 5, r=4)
    edit_config(other, base_model_name_or_path="/elsewhere/llama")
    request = ["--strategy", "flora", "--out", tmp_path / "out", alike["llama"][0], other]
    refused(aggregate(*request), "different base models", "/elsewhere/llama", "--base")
    result = aggregate(*request, "--base", bases["llama"])
    assert f"all were taken to belong to {bases['llama']}" in result.stdout


def test_a_rule_with_weights_of_its_own_shows_those(
    bases: Mapping[str, Path], alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    given = alike["llama"]
    result = aggregate("--strategy", "hetlora", "--weights=98,1,1", "--json", "--out", tmp_path / "a", *given)
    found = json.loads(result.stdout)
    sizes = [deltas(loaded("llama", bases["llama"], d)) for d in given]
    used = [
        sum(
            float(np.linalg.norm(own[name])) / sum(float(np.linalg.norm(each[name])) for each in sizes)
            for name in own
        )
        / len(own)
        for own in sizes
    ]
    assert found["weights"] == pytest.approx(used, rel=1e-5)
    assert "--weights do not count" in found["notes"][0]
    shown = aggregate("--strategy", "hetlora", "--out", tmp_path / "b", *given)
    assert "equal weights" not in shown.stdout
    assert f"weight {used[0]:.4f}" in shown.stdout


def test_a_rule_that_is_another_in_its_first_round_says_so(
    alike: Mapping[str, list[Path]], tmp_path: Path
) -> None:
    shown = aggregate("--strategy", "fedrot", "--out", tmp_path / "fedrot", *alike["llama"])
    assert "note: one round of fedrot from zero is FedAvg" in shown.stdout
    assert (
        "from zero is"
        not in aggregate("--strategy", "fedavg", "--out", tmp_path / "fedavg", *alike["llama"]).stdout
    )
    one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("fedrot", "fedavg"))
    torch.testing.assert_close(one, two)
