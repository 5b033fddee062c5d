"""One resident base for many clients: each sees its own adapter and nothing of the others."""

from __future__ import annotations

import pytest
import torch

from fedlora.config import ModelConfig
from fedlora.core.factors import AdapterSet, LoraFactors
from fedlora.core.init_drawn import fresh_adapters
from fedlora.errors import ConfigError, FactorShapeError
from fedlora.models import AdaptedModel, build_model, resolve_targets
from tests.models.samples import adapted, logits, random_adapters, token_batch

BOTH = frozenset("AB")


def gradients(model: AdaptedModel) -> dict[str, torch.Tensor]:
    with model.training() as trained:
        model.module(**token_batch()).logits.square().sum().backward()
        named = {**trained.factors, **trained.head}
        return {name: p.grad.clone() for name, p in named.items()}


def test_clients_of_mixed_ranks_equal_fresh_models() -> None:
    resident = adapted()
    for seed, (rank, scaling) in enumerate([(4, 2.0), (8, 0.5), (4, 1.0), (2, 3.0), (8, 2.0)]):
        adapters = random_adapters(resident.modules, rank, scaling, seed)
        head = {"classifier.bias": torch.tensor([0.1 * seed, -0.3])}
        results = []
        for model in (resident, adapted()):
            model.load(adapters, head, trained=BOTH, train_head=True)
            results.append((logits(model.module, token_batch()), gradients(model)))
        (ours, our_gradients), (fresh, fresh_gradients) = results
        assert torch.equal(ours, fresh)
        assert our_gradients.keys() == fresh_gradients.keys()
        assert all(torch.equal(our_gradients[name], fresh_gradients[name]) for name in our_gradients)


def test_a_stale_adapter_reaches_neither_forward_nor_gradients() -> None:
    model = adapted()
    model.load(fresh_adapters(model.modules, 2, 1.0, 0), {})
    base = logits(model.module, token_batch())
    model.load(random_adapters(model.modules, 8), {}, trained=BOTH, train_head=True)
    gradients(model)
    model.load(fresh_adapters(model.modules, 4, 1.0, 0), {}, trained=BOTH)
    assert torch.equal(logits(model.module, token_batch()), base)
    gradients(model)
    trainable = {id(p) for p in model.trainable().all}
    assert {id(p) for p in model.module.parameters() if p.requires_grad} == trainable
    assert all(p.grad is None for p in model.module.parameters())


def test_read_returns_what_was_loaded_as_copies() -> None:
    model = adapted()
    adapters = random_adapters(model.modules, 4, 0.7)
    head = {name: torch.randn_like(t) for name, t in model.initial_head.items()}
    model.load(adapters, head)
    for _ in range(2):
        got, got_head = model.read()
        assert list(got) == list(adapters)
        for name, factors in adapters.items():
            assert torch.equal(got[name].A, factors.A)
            assert torch.equal(got[name].B, factors.B)
            assert got[name].scaling == factors.scaling
            got[name].A.zero_()
        assert all(torch.equal(got_head[name], head[name]) for name in head)


def test_a_head_that_is_not_given_is_the_initial_one() -> None:
    model = adapted()
    adapters = random_adapters(model.modules, 4)
    model.load(adapters, {name: t + 1 for name, t in model.initial_head.items()}, train_head=True)
    model.load(adapters, {})
    _, head = model.read()
    assert all(torch.equal(head[name], t) for name, t in model.initial_head.items())


@pytest.mark.parametrize("trained", [frozenset(), frozenset("A"), frozenset("B"), BOTH])
@pytest.mark.parametrize("train_head", [False, True])
def test_exactly_what_is_asked_for_is_trained(trained: frozenset[str], train_head: bool) -> None:
    model = adapted()
    first = next(iter(model.modules))
    model.load(random_adapters(model.modules, 4), {}, trained=BOTH, train_head=not train_head)
    model.load(
        random_adapters(model.modules, 4),
        {},
        trained=trained,
        modules=frozenset({first}),
        train_head=train_head,
    )
    trainable = model.trainable()
    assert set(trainable.factors) == {f"{first}.{letter}" for letter in trained}
    assert set(trainable.head) == (set(model.initial_head) if train_head else set())
    assert sum(p.requires_grad for p in model.module.parameters()) == len(trainable.all)


def test_only_lora_dropout_is_active_in_training() -> None:
    model = adapted()
    adapters = random_adapters(model.modules, 4)
    model.load(adapters, {}, trained=BOTH, dropout=0.5)
    plain = logits(model.module, token_batch())
    with model.training():
        active = [m for m in model.module.modules() if isinstance(m, torch.nn.Dropout) and m.training]
        assert {m.p for m in active} == {0.5}
        assert len(active) == len(model.modules)
        assert not torch.equal(logits(model.module, token_batch()), plain)
    assert torch.equal(logits(model.module, token_batch()), plain)
    model.load(adapters, {}, trained=BOTH, dropout=0.0)
    with model.training():
        assert torch.equal(logits(model.module, token_batch()), plain)


def test_every_factor_pair_matters() -> None:
    model = adapted(targets="query,value,output.dense")
    adapters = random_adapters(model.modules, 4)
    model.load(adapters, {})
    full = logits(model.module, token_batch())
    for name, factors in adapters.items():
        silenced = LoraFactors(factors.A, torch.zeros_like(factors.B), factors.scaling)
        model.load({**adapters, name: silenced}, {})
        assert not torch.allclose(logits(model.module, token_batch()), full, atol=1e-5)


def test_loading_leaves_the_global_random_state_alone() -> None:
    model = adapted()
    before = torch.get_rng_state()
    model.load(random_adapters(model.modules, 3), {})
    assert torch.equal(before, torch.get_rng_state())


def test_the_template_names_every_layer_and_shares_the_head_on_request() -> None:
    model = adapted()
    template = model.template(4, 2.0)
    assert (template.rank, template.scaling) == (4, 2.0)
    assert list(template.modules) == list(model.modules)
    assert set(template.head) == {"classifier.weight", "classifier.bias"}
    assert model.template(4, 2.0, share_head=False).head == {}


def test_a_rank_that_no_layer_allows_is_refused() -> None:
    model = adapted()
    for attempt in (
        lambda: model.template(33, 1.0),
        lambda: model.load(random_adapters(model.modules, 33), {}),
    ):
        with pytest.raises(ConfigError, match=r"lora\.rank = 33: backbone\.\S+query allows at most 32"):
            attempt()


def broken(kind: str, adapters: AdapterSet) -> AdapterSet:
    first, *rest = adapters
    f = adapters[first]
    return {
        "missing": {name: adapters[name] for name in rest},
        "foreign": {**adapters, "x": f},
        "rank": {**adapters, first: LoraFactors(f.A[:1], f.B[:, :1], 1.0)},
        "wide": {**adapters, first: LoraFactors(f.A[:, :1], f.B, 1.0)},
        "tall": {**adapters, first: LoraFactors(f.A, f.B[:1], 1.0)},
    }[kind]


@pytest.mark.parametrize("kind", ["missing", "foreign", "rank", "wide", "tall"])
def test_adapters_that_do_not_fit_are_refused(kind: str) -> None:
    model = adapted()
    with pytest.raises(FactorShapeError):
        model.load(broken(kind, random_adapters(model.modules, 4)), {})


@pytest.mark.parametrize("head", [{"score": torch.zeros(2)}, {"classifier.bias": torch.zeros(1)}])
def test_a_head_that_does_not_fit_is_refused(head: dict[str, torch.Tensor]) -> None:
    model = adapted()
    with pytest.raises(FactorShapeError, match=r"the head has no \S+ \(\d,\), it is classifier\.weight"):
        model.load(random_adapters(model.modules, 4), head)


def test_of_a_model_without_a_head_it_is_said_that_it_has_none() -> None:
    module = build_model(ModelConfig(name="tiny-lm"), 0, 0, "language-model")
    model = AdaptedModel(module, resolve_targets(module, ""))
    with pytest.raises(FactorShapeError, match=r"the head has no lm_head\.weight \(2,\), it has none$"):
        model.check(random_adapters(model.modules, 4), {"lm_head.weight": torch.zeros(2)})
