"""Adapters as files that PEFT reads, with what is needed to rebuild the base beside them.

`fedlora.models.peft_files` reads what PEFT wrote.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn

from fedlora.core.adapters import as_lora
from fedlora.core.decompositions import svd
from fedlora.core.factors import PLAIN, AdapterSet, LoraFactors, Product, Tensors
from fedlora.core.files import new_directory
from fedlora.core.parallel import parallel_map
from fedlora.core.peft_keys import PREFIX, key_of, to_peft
from fedlora.core.state import State
from fedlora.errors import ConfigError
from fedlora.models.adapted import AdaptedModel
from fedlora.models.build import build_model
from fedlora.models.card import AdapterCard
from fedlora.models.peft_names import TENSORS_FILE
from fedlora.models.reloaded import check_reloads
from fedlora.models.serving import cut, vllm_says
from fedlora.tasks import task_named

POOLER = "pooler"
"""Part of a base that transformers draws at random where a checkpoint lacks it."""
Beside: TypeAlias = Callable[[Path], None]
"""Writes further files into an adapter's directory before it gets its name."""


def save_adapter(
    directory: Path,
    state: State,
    head: Tensors,
    card: AdapterCard,
    *,
    model: AdaptedModel | None = None,
    beside: Beside | None = None,
    max_rank: int = 0,
) -> dict[str, Any]:
    """Write the global model of a state as a PEFT adapter over the pristine base.

    ``PeftModel.from_pretrained(build_model(...), directory)`` then computes what the federated model
    computes. Base patches are folded into the adapter (see `global_adapters`). An adapter that was
    there before is replaced at once, never half.

    Args:
        directory: created or replaced.
        state: the state to export.
        head: the head tensors that ``state.head`` does not have, for instance those of a frozen head.
        card: written beside the adapter.
        model: in which the state was trained: what its layers are called, and what else it has.
        beside: writes further files into the directory.
        max_rank: see `fedlora.models.serving.cut`.

    Returns:
        What was written: its largest rank, the share of its energy that was cut off, and how vLLM serves it.
    """
    shorter, names = cut(global_adapters(state), max_rank), frozenset[str]()
    fields = card.auto_fields(None if model is None else type(model.module))
    if model is not None:
        fields["fan_in_fan_out"] = model.fan_in_fan_out
        head, names = {**model.drawn, **head}, names if card.mean_pooled else model.names
    heads = {**head, **state.head}
    write_adapter(directory, shorter.adapters, heads, card, whole=names, beside=beside, **fields)
    return {
        "rank": max(factors.rank for factors in shorter.adapters.values()),
        "energy_lost": shorter.energy_lost,
        "vllm": vllm_says(shorter.adapters, heads),
    }


def save_loaded(
    directory: Path, model: AdaptedModel, card: AdapterCard, *, beside: Beside | None = None
) -> None:
    """Write the adapter that a model holds in its own PEFT format, where `InjectedAdapter.saved` gives one.

    What was there before is replaced at once; ``beside`` writes further files.
    """
    saved = model.adapter.saved()
    assert saved is not None, "an adapter that is written from the state"
    config, tensors = copy.deepcopy(saved[0]), saved[1]
    head = model.drawn | model.read()[1]
    config.modules_to_save = saved_modules(head)
    config.target_modules = targets_of(model.modules, head, () if card.mean_pooled else model.names)
    config.inference_mode = True
    for field, value in card.auto_fields(type(model.module)).items():
        setattr(config, field, value)
    tensors |= {PREFIX + name: tensor for name, tensor in head.items()}
    with new_directory(directory) as fresh:
        config.save_pretrained(fresh)
        contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, fresh / TENSORS_FILE, {"format": "pt"})
        card.write(fresh)
        if beside is not None:
            beside(fresh)


def write_adapter(
    directory: Path,
    adapters: AdapterSet,
    head: Tensors,
    card: AdapterCard | None,
    *,
    embeddings: Collection[str] = (),
    frozen: Tensors | None = None,
    base: nn.Module | None = None,
    whole: Collection[str] = (),
    beside: Beside | None = None,
    **fields: Any,
) -> None:
    """Write adapters and head in PEFT's format, replacing what was there at once.

    PEFT loads it, without values, before it gets its name.

    Args:
        directory: created or replaced.
        adapters: without cores.
        head: the tensors of ``modules_to_save``.
        card: written beside the adapter, if there is one.
        embeddings: those of the modules that are embeddings.
        frozen: weights of the base that are kept beside the adapter.
        base: the base, on the meta device, for PEFT to load the adapter into; changed by that.
        whole: the names of all modules of the base, where they are known.
        beside: writes further files into the directory.
        fields: more of PEFT's ``LoraConfig``.

    Raises:
        RunFailed: PEFT would not load it, or not as it was meant; nothing is written then.
    """
    others = [] if base is None else [name for name, _ in base.named_modules()]
    tensors = peft_tensors(adapters, head, embeddings) | {
        PREFIX + name: tensor.contiguous() for name, tensor in (frozen or {}).items()
    }
    with new_directory(directory) as fresh:
        config = peft_config(adapters, head, **fields)
        config.target_modules = targets_of(adapters, [*others, *head], whole)
        config.save_pretrained(fresh)
        save_file(tensors, fresh / TENSORS_FILE, {"format": "pt"})
        check_reloads(fresh, TENSORS_FILE, adapters, embeddings, base)
        if card is not None:
            card.write(fresh)
        if beside is not None:
            beside(fresh)


def load_adapter(directory: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, AdapterCard]:
    """The exported model in evaluation mode (a PeftModel), and its card.

    Raises:
        ConfigError: the directory does not hold an adapter that fedlora wrote.
    """
    card = AdapterCard.read(directory)
    base = build_model(card.model, len(card.label_names), card.seed, task_named(card.task).network)
    try:
        with warnings.catch_warnings():  # of PEFT's about a name that transformers will change
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            model: nn.Module = PeftModel.from_pretrained(base, directory, torch_device="cpu")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{directory}: not a PEFT adapter of {card.model.name} ({reason})") from None
    return model.to(device).eval(), card


def global_adapters(state: State) -> AdapterSet:
    """Adapters that make the global model from the pristine base, ranks differing by layer if need be.

    Where the base never moved this is the state's own adapter, bit for bit (a core is folded into A). A
    layer with patches gets the SVD of patches + adapter, at most min(out, in) directions, with scaling 1.
    """

    def whole(name: str) -> LoraFactors:
        if name in state.moved:
            return recompressed(state.product(name))
        return as_lora(state.adapters[name]).folded()

    return dict(zip(state.adapters, parallel_map(whole, state.adapters), strict=True))


def peft_config(adapters: AdapterSet, head: Tensors, **fields: Any) -> PeftLoraConfig:
    """PEFT's configuration of an adapter; alpha is scaling * rank, so that rsLoRA needs no flag.

    Its ``r`` is the largest rank, because serving engines look at nothing else.
    """
    ranks = {name: factors.rank for name, factors in adapters.items()}
    alphas = {name: factors.scaling * factors.rank for name, factors in adapters.items()}
    widest = max(ranks, key=lambda name: ranks[name])
    rank, alpha = ranks[widest], alphas[widest]
    own: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exactly(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(name): a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(adapters),
        "modules_to_save": saved_modules(head),
        "inference_mode": True,
    }
    return PeftLoraConfig(**own | fields)


def saved_modules(head: Collection[str]) -> list[str] | None:
    """PEFT's ``modules_to_save`` of these tensors: children of the network, and poolers by their path.

    >>> saved_modules(["classifier.dense.weight", "bert.pooler.dense.bias"])
    ['bert.pooler', 'classifier']
    """
    found = set()
    for name in head:
        parts = name.split(".")
        found.add(".".join(parts[: parts.index(POOLER) + 1 if POOLER in parts else 1]))
    return sorted(found) or None


def exactly(name: str) -> str:
    r"""The pattern by which PEFT finds this module, and none whose name ends so or looks like it.

    >>> exactly("layers.1.proj")
    '^layers\\.1\\.proj'
    """
    return "^" + re.escape(name)


def targets_of(
    adapters: Collection[str], others: Collection[str], whole: Collection[str] = ()
) -> list[str] | str:
    r"""``target_modules`` of exactly these modules: their names, or a pattern where names would take more.

    Where the whole base is known and their last names alone take the same modules, it is these, as PEFT's
    own configurations have it.

    PEFT takes every module whose name ends with ``.`` and a listed name; a name without a dot ends many.

    Args:
        adapters: the adapted modules.
        others: names of other modules, or of tensors in them, as far as they are known.
        whole: names of all modules of the base, or none.

    >>> targets_of(["a.q", "a.v"], []), targets_of(["a.q"], ["b.a.q"]), targets_of(["q"], [])
    (['a.q', 'a.v'], '(?:a\\.q)', '(?:q)')
    >>> targets_of(["a.q", "b.q"], [], ["a.q", "b.q", "a"]), targets_of(["a.q"], [], ["a.q", "b.q", "a"])
    (['q'], ['a.q'])
    """
    names, last = sorted(adapters), {name.rpartition(".")[2] for name in adapters}
    if whole and not any(name.rpartition(".")[2] in last for name in whole if name not in adapters):
        return sorted(last)
    parts = (other.split(".") for other in others if other not in adapters)
    ends = {".".join(split[start:end]) for split in parts for start in range(1, len(split))
            for end in (len(split), len(split) - 1)}  # fmt: skip
    loose = ends.intersection(names) or any("." not in name for name in names)
    return f"(?:{'|'.join(map(re.escape, names))})" if loose else names


def peft_tensors(adapters: AdapterSet, head: Tensors, embeddings: Collection[str] = ()) -> Tensors:
    """The tensors of PEFT's checkpoint format, each with memory of its own."""
    tensors = to_peft(adapters, head)
    for name in embeddings:
        for factor in PLAIN:
            tensors[f"{PREFIX}{name}.lora_embedding_{factor}"] = tensors.pop(key_of(name, factor))
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def recompressed(product: Product) -> LoraFactors:
    """The product as B = U S, A = V^T, without directions below float32 resolution (at least one stays)."""
    U, S, Vh = svd(product)
    kept = max(1, int((S[0] * torch.finfo(S.dtype).eps < S).sum()))
    return LoraFactors(A=Vh[:kept], B=U[:, :kept] * S[:kept], scaling=1.0)
