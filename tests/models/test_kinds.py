"""Laws of every kind of adapter, taken from the registry."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel

from clients.training.dp_mechanism import Mechanism
from clients.training.self_check import check_noise, check_steps
from fedlora import wire
from fedlora.adapters import KINDS, NOT_HERE, TUNERS, adapter_kind, check_kind
from fedlora.config import LoraConfig, ModelConfig
from fedlora.core.adapters import Adapters
from fedlora.core.state import ClientSpec, ClientUpdate, ServerState, State
from fedlora.errors import ConfigError, FactorShapeError, NotApplicable, RunFailed
from fedlora.models import AdaptedModel, AdapterCard, build_model, resolve_targets
from fedlora.models.export import save_loaded
from fedlora.server.checkpoint import read_checkpoint, write_checkpoint
from fedlora.server.exactness import check_parts, mean_is_exact, rounds
from strategies.registry import RULES, make_rule
from strategies.robust import make_center
from strategies.rule import Rule
from strategies.server_optimizer import ServerOptimizer
from tests.clients.samples import PAD
from tests.models.kinds import config_of, model_with, moved, names_of, start_of
from tests.models.samples import adapted, logits, token_batch

pytestmark = pytest.mark.slow

SPEC = ClientSpec(partition_id=0, rank=4, scaling=4.0)
ANY_KIND = [name for name, rule in RULES.items() if rule.facts.any_kind]
AFFINE = {"fourierft", "waveft", "c3a", "shira", "sara", "ia3", "miss", "psoft"}
"""Kinds whose weight is affine in all that is trained; measured here, declared nowhere else."""
DOCUMENTED = (Path(__file__).parents[2] / "docs" / "peft.md").read_text()
LOOP = Mechanism(noise_multiplier=0.8, max_grad_norm=0.5, expected_batch_size=16, grad_sample_mode="loop")


def begun(rule: Rule, method: str) -> State:
    model = model_with(method)
    return rule.init(model.template(4, 4.0), 0)


@pytest.mark.parametrize("method", KINDS)
def test_it_starts_at_the_base_and_alike_for_one_seed(method: str) -> None:
    one, two, batch = model_with(method, seed=7), model_with(method, seed=7), token_batch()
    start, again = start_of(one), start_of(two)
    one.load(start, {})
    torch.testing.assert_close(logits(one.module, batch), logits(adapted().module, batch), rtol=0, atol=1e-6)
    for module, adapter in start.items():
        for name, tensor in adapter.tensors().items():
            assert torch.equal(tensor, again[module].tensors()[name])
    two.load(moved(again, 1), {})  # what is drawn and not trained is alike too
    one.load(moved(start, 1), {})
    assert torch.equal(logits(one.module, batch), logits(two.module, batch))


@pytest.mark.parametrize("method", [name for name, tuner in TUNERS.items() if tuner.seed])
def test_what_is_drawn_and_not_trained_is_of_the_runs_seed(method: str) -> None:
    one, other, batch = model_with(method, seed=7), model_with(method, seed=8), token_batch()
    given = moved(start_of(one), 1)
    one.load(given, {})
    other.load(given, {})
    assert (logits(one.module, batch) - logits(other.module, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("method", KINDS)
def test_what_is_loaded_is_read_and_other_shapes_are_refused(method: str) -> None:
    model = model_with(method)
    given = moved(start_of(model), 2)
    model.load(given, {}, trained=names_of(given))
    found, _ = model.read()
    for module, adapter in given.items():
        assert found[module].tensors().keys() == adapter.tensors().keys()
        for name, tensor in adapter.tensors().items():
            assert torch.equal(found[module].tensors()[name], tensor)
            assert f"{module}.{name}" in model.trainable().factors
    first = next(iter(given))
    name, tensor = next(iter(given[first].tensors().items()))
    with pytest.raises(FactorShapeError):
        model.load({**given, first: given[first].replaced({name: tensor[..., :-1]})}, {})


@pytest.mark.parametrize("method", KINDS)
def test_messages_and_checkpoints_bring_back_the_same_tensors(method: str, tmp_path: Path) -> None:
    rule = make_rule("fedavg")
    state = begun(rule, method)
    state = replace(state, adapters=moved(state.adapters, 3), round=1)
    sent = rule.broadcast(state, SPEC)
    parts = wire.from_peft(wire.to_peft(sent.adapters, {"h": torch.ones(1)}), names_of(sent.adapters))
    assert list(parts.head) == ["h"]
    write_checkpoint(tmp_path, ServerState(state))
    kept = read_checkpoint(tmp_path)
    assert kept is not None
    for module, adapter in state.adapters.items():
        assert parts.layers[module].keys() == adapter.tensors().keys()
        for name, tensor in adapter.tensors().items():
            assert torch.equal(parts.layers[module][name], tensor)
            assert torch.equal(kept.state.adapters[module].tensors()[name], tensor)
        for roles in ({"A"}, {"B"}):
            assert kept.state.adapters[module].part(roles) == adapter.part(roles)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("name", ["fedavg", "ffa"])
def test_one_client_alone_gets_its_own_model(name: str, method: str) -> None:
    rule = make_rule(name)
    state = begun(rule, method)
    sent = rule.broadcast(state, SPEC)
    trained = {
        module: adapter.replaced(
            {n: t for n, t in moved(sent.adapters, 4)[module].tensors().items() if n in sent.trained}
        )
        for module, adapter in sent.adapters.items()
    }
    update = ClientUpdate(partition_id=0, adapters=trained, head={}, weight=3.0)
    after, _ = rule.aggregate(state, [replace(update, head=dict(state.head))])
    for module, adapter in trained.items():
        for n, tensor in adapter.tensors().items():
            torch.testing.assert_close(after.adapters[module].tensors()[n], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("name", ANY_KIND)
def test_the_mean_is_called_exact_exactly_where_it_is(name: str, method: str) -> None:
    """Against the weights themselves: an identity through each layer, of both clients and of their mean."""
    rule = make_rule(name)
    model, state = model_with(method), begun(rule, method)
    if not rule.facts.global_adapter:
        assert mean_is_exact(rule, model, state.adapters) == rule.facts.exact
        return
    state = replace(state, adapters=moved(state.adapters, 5))
    gaps = []
    for server_round in rounds(state.adapters):
        sent = rule.broadcast(replace(state, round=server_round - 1), SPEC)
        if not sent.trained:
            return  # rolora and one part: refused, see below
        updates = []
        for partition in (0, 1):
            own = moved(sent.adapters, 6 + partition)
            adapters = {
                m: a.replaced({n: t for n, t in own[m].tensors().items() if n in sent.trained})
                for m, a in sent.adapters.items()
            }
            updates.append(
                ClientUpdate(
                    partition_id=partition, adapters=adapters, head=dict(sent.head), weight=partition + 1.0
                )
            )
        after, _ = rule.aggregate(replace(state, round=server_round - 1), updates)
        ends = [weights(model, u.adapters) for u in updates]
        wanted, found = ends[0] / 3 + 2 * ends[1] / 3, weights(model, after.adapters)
        gaps.append(float((found - wanted).norm() / (ends[0] - ends[1]).norm()))
    model.load(state.adapters, {})
    assert mean_is_exact(rule, model, state.adapters) == (max(gaps) < 1e-4), gaps
    if name == "fedavg":
        assert (max(gaps) < 1e-4) == (method in AFFINE)


def weights(model: AdaptedModel, adapters: Adapters) -> torch.Tensor:
    """All layers' outputs on an identity."""
    model.load(adapters, {})
    with torch.no_grad():
        rows = [
            model.module.get_submodule(name)(torch.eye(spec.in_features)).double().flatten()
            for name, spec in model.modules.items()
        ]
    return torch.cat(rows)


@pytest.mark.parametrize("method", KINDS)
def test_turns_train_one_tensor_a_round_and_begin_with_what_starts_the_update(method: str) -> None:
    rule = make_rule("turns")
    state = begun(rule, method)
    everything = names_of(state.adapters)
    trained = [rule.broadcast(replace(state, round=t), SPEC).trained for t in range(2 * len(everything))]
    assert all(len(names) == 1 for names in trained)
    assert frozenset().union(*trained[: len(everything)]) == everything
    assert trained[len(everything) :] == trained[: len(everything)]
    assert trained[0] <= next(iter(state.adapters.values())).part({"B"})


def test_a_layer_without_the_tensor_whose_turn_it_is_rests() -> None:
    """LoKr splits its larger factor in large layers alone."""
    module = build_model(ModelConfig(name="tiny"), 2, 0)
    options = {"rank_dropout": 0.0, "decompose_factor": 4}
    config = LoraConfig(method="lokr", rank=7, method_options=json.dumps(options))
    targets = resolve_targets(module, "attention.self.query,intermediate.dense")
    model = AdaptedModel(module, targets, kind=adapter_kind(config, 0))
    rule = make_rule("turns")
    state = rule.init(model.template(4, 4.0), 0)
    assert len({frozenset(a.tensors()) for a in state.adapters.values()}) == 2
    assert mean_is_exact(rule, model, state.adapters)
    for t in range(len(names_of(state.adapters))):
        now = replace(state, round=t, adapters=moved(state.adapters, t))
        sent = rule.broadcast(now, SPEC)
        model.load(sent.adapters, {}, trained=sent.trained, modules=sent.modules)
        (name,) = sent.trained
        having = {m for m, a in state.adapters.items() if name in a.tensors()}
        assert set(model.trainable().factors) == {f"{m}.{name}" for m in having}
        update = ClientUpdate(partition_id=0, adapters=moved(now.adapters, 9), head=dict(now.head), weight=1)
        after, _ = rule.aggregate(now, [update])
        for m, adapter in after.adapters.items():
            for n, tensor in adapter.tensors().items():
                source = update.adapters if n == name else now.adapters
                torch.testing.assert_close(tensor, source[m].tensors()[n])


@pytest.mark.parametrize("method", TUNERS)
def test_the_table_of_the_documentation_says_what_is_measured(method: str) -> None:
    row = next(
        r for r in DOCUMENTED.splitlines() if r.startswith(f"| `{method}` | `{TUNERS[method].config}` |")
    )
    _, _, config, *cells, has, _ = (cell.strip() for cell in row.split("|"))
    tuner, model = TUNERS[method], model_with(method)
    adapters = start_of(model)
    assert config == f"`{tuner.config}`"
    assert has == (", ".join(n for n in ("rank", "alpha", "dropout") if getattr(tuner, n)) or "-")
    for name, cell in zip(("fedavg", "ffa", "rolora", "turns"), cells, strict=True):
        rule = make_rule(name)
        try:
            check_parts(rule, method, adapters)
        except NotApplicable:
            assert cell == "-"
        else:
            assert cell == ("yes" if mean_is_exact(rule, model, adapters) else "no"), (name, method)


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_no_mean_is_exact_beside_a_robust_centre_or_a_server_optimiser(method: str) -> None:
    model = model_with(method)
    for name in ("ffa", "rolora"):
        for beside in ({"center": make_center("multi-krum")}, {"optimizer": ServerOptimizer(name="fedavgm")}):
            assert not mean_is_exact(make_rule(name, **beside), model, start_of(model))


@pytest.mark.parametrize("start", ["bat", "mini"])
def test_miss_in_its_other_forms_is_affine_too(start: str) -> None:
    options = {"init_weights": start} | ({"mini_r": 4} if start == "mini" else {})
    module = build_model(ModelConfig(name="tiny"), 2, 0)
    config = LoraConfig(method="miss", rank=4, method_options=json.dumps(options))
    model = AdaptedModel(module, resolve_targets(module, ""), kind=adapter_kind(config, 0))
    assert mean_is_exact(make_rule("fedavg"), model, start_of(model))


@pytest.mark.parametrize("method", TUNERS)
def test_peft_loads_what_is_exported_as_what_it_is(method: str, tmp_path: Path) -> None:
    model, batch = model_with(method), token_batch()
    model.load(moved(start_of(model), 8), {name: t + 0.1 for name, t in model.initial_head.items()})
    card = AdapterCard(model=ModelConfig(name="tiny"), label_names=("a", "b"), max_length=32, seed=0)
    save_loaded(tmp_path / "adapter", model, card)
    assert type(PeftConfig.from_pretrained(tmp_path / "adapter")) is TUNERS[method].config_type
    base = build_model(ModelConfig(name="tiny"), 2, 0)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, batch), logits(model.module, batch), rtol=1e-4, atol=1e-5)
    assert (logits(loaded, batch) - logits(adapted().module, batch)).abs().max() > 0.01


@pytest.mark.parametrize("method", KINDS)
def test_private_steps_are_what_they_claim(method: str) -> None:
    model = model_with(method)
    start = moved(start_of(model), 9, size=0.05)
    model.load(start, {}, trained=names_of(start), train_head=True)
    check_steps(model, PAD, replace(LOOP, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1))
    check_noise(model, PAD, LOOP, numbers=40_000)


def test_opacus_hooks_do_not_pass_for_a_tuner() -> None:
    model = model_with("vera")
    start = moved(start_of(model), 9, size=0.05)
    model.load(start, {}, trained=names_of(start), train_head=True)
    with pytest.raises(RunFailed, match="privacy self-test"):
        check_steps(model, PAD, replace(LOOP, noise_multiplier=0.0, grad_sample_mode="hooks"))


@pytest.mark.parametrize("method", [*NOT_HERE, "no-such"])
def test_methods_that_are_not_here_say_why(method: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_kind(LoraConfig(method=method))
    text = str(error.value)
    assert text.startswith(f"lora.method = '{method}': ")
    assert f"accepted are {', '.join(KINDS)}" in text
    assert "\n" not in text


@pytest.mark.parametrize("method", TUNERS)
def test_what_a_tuner_would_ignore_is_refused(method: str) -> None:
    tuner = TUNERS[method]
    check_kind(config_of(method))
    with pytest.raises(ConfigError, match=r"lora\.ranks = '2,4': is of lora alone"):
        check_kind(config_of(method, ranks="2,4"))
    for name, value, has in (("alpha", 3.0, tuner.alpha), ("dropout", 0.1, tuner.dropout)):
        if has:
            check_kind(config_of(method, **{name: value}))
        else:
            with pytest.raises(ConfigError, match=rf"lora\.{name} = {value}: {method} has none"):
                check_kind(config_of(method, **{name: value}))
    with pytest.raises(ConfigError, match=rf"lora\.method-options no_such = 1: {method} accepts "):
        check_kind(replace(config_of(method), method_options='{"no-such": 1}'))


def test_lora_takes_no_options_and_a_near_name_is_said() -> None:
    with pytest.raises(ConfigError, match=r"lora\.method-options = .*of other methods"):
        check_kind(LoraConfig(method_options='{"r": 3}'))
    with pytest.raises(ConfigError, match=r"lora\.method = 'veraa' \(did you mean vera\?\)"):
        check_kind(LoraConfig(method="veraa"))


def test_sara_trains_the_weights_that_are_nearest_to_zero() -> None:
    """As many as SHiRA, and those alone move."""
    model = model_with("sara")
    before = {name: spec.weight.detach().clone() for name, spec in base_layers(model).items()}
    model.load(moved(start_of(model), 1), {})
    for name, layer in base_layers(model).items():
        delta = model.module.get_submodule(name).get_delta_weight("default").to_dense()
        weight, number = before[name], 4 * sum(layer.weight.shape)
        assert int((delta != 0).sum()) == number
        assert float(weight[delta != 0].abs().max()) <= float(weight[delta == 0].abs().min())


def base_layers(model: AdaptedModel) -> dict[str, Any]:
    """The linear layers under the adapters."""
    return {name: model.module.get_submodule(name).get_base_layer() for name in model.modules}
