"""Kinds of adapters that people have: each aggregated rightly, or refused in one line that names the thing.

Right is what PEFT's own merged weights say: base + sum_k p_k (merged_k - base), tensor by tensor.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.aggregate.saved import aggregate, edit_config, refused

pytestmark = pytest.mark.slow

P = (0.75, 0.25)
LLAMA = transformers.LlamaConfig(
    vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
)
GPT2 = transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16)
MODELS: Mapping[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaForCausalLM, LLAMA),
    "classifier": (transformers.LlamaForSequenceClassification, LLAMA),
    "gpt2": (transformers.GPT2LMHeadModel, GPT2),
}
Change = Callable[[Path], Any]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """Two adapters of a kind.

    Attributes:
        both: PEFT's configuration of both.
        second: what the second has otherwise.
        change: what happens to each saved directory, or to the second alone.
        refused: words of the one line, where it cannot be aggregated.
    """

    both: Config = field(default_factory=dict)
    second: Config = field(default_factory=dict)
    change: Change = lambda directory: None
    change_second: Change = lambda directory: None
    model: str = "llama"
    refused: str = ""
    make: Callable[..., Any] = peft.LoraConfig


def renamed(change: Callable[[str], str]) -> Change:
    def edit(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)

    return edit


def inside(wrapper: str) -> Change:
    """The names of a model that was wrapped before PEFT adapted it, in tensors and configuration."""

    def edit(directory: Path) -> None:
        renamed(lambda key: key.replace("base_model.model.", f"base_model.model.{wrapper}."))(directory)
        config = json.loads((directory / "adapter_config.json").read_text())
        layers = load_file(directory / "adapter_model.safetensors")
        named = sorted(
            {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in layers if "lora" in k}
        )
        patterns = {f"{wrapper}.{name}": rank for name, rank in config["rank_pattern"].items()}
        mapping = {"base_model_class": "OptimizedModule", "parent_library": "torch._dynamo.eval_frame"}
        edit_config(
            directory, target_modules=named, rank_pattern=patterns, task_type=None, auto_mapping=mapping
        )

    return edit


def dtype(kind: torch.dtype) -> Change:
    def edit(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        save_file({key: tensor.to(kind) for key, tensor in load_file(file).items()}, file)

    return edit


def config(**fields: Any) -> Change:
    return lambda directory: edit_config(directory, **fields)


def added(name: str, *shape: int, value: float = 1.0) -> Change:
    def edit(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        save_file({**load_file(file), name: torch.full(shape, value)}, file)

    return edit


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


def moved_inside(directory: Path) -> None:
    (directory / "german").mkdir()
    for file in list(directory.glob("adapter*")):
        file.rename(directory / "german" / file.name)


def sharded(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model-00001-of-00001.safetensors")


EMBED = "base_model.model.model.embed_tokens"
WRAPPED = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}}
KINDS: Mapping[str, Kind] = {
    # right
    "plain": Kind(),
    "mixed ranks and alphas": Kind(second={"r": 5, "lora_alpha": 3}),
    "rsLoRA on one side": Kind(second={"use_rslora": True, "r": 4}),
    "rank and alpha patterns": Kind({"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.*": 7}}),
    "a pattern of full names": Kind({"rank_pattern": {"^model.layers.1.self_attn.q_proj": 5}}),
    "all linear layers": Kind({"target_modules": "all-linear"}),
    "a regular expression": Kind({"target_modules": r".*\.(q|up)_proj"}),
    "other targets on one side": Kind(second={"target_modules": ["v_proj", "down_proj"]}),
    "some layers": Kind({"layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded modules": Kind({"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "lm_head": Kind({"target_modules": ["q_proj", "lm_head"]}),
    "lm_head on one side": Kind(second={"target_modules": ["q_proj", "lm_head"]}),
    "lm_head alone": Kind({"target_modules": ["lm_head"]}),
    "an embedding": Kind({"target_modules": ["embed_tokens", "q_proj"]}),
    "an embedding of other ranks": Kind({"target_modules": ["embed_tokens"]}, {"r": 4, "use_rslora": True}),
    "embedding and lm_head": Kind({"target_modules": ["embed_tokens", "lm_head"]}),
    "a head": Kind({"task_type": "SEQ_CLS"}, model="classifier"),
    "a whole lm_head": Kind({"modules_to_save": ["lm_head"]}),
    "Conv1D": Kind({"target_modules": ["c_attn"], "fan_in_fan_out": True}, model="gpt2"),
    "Conv1D, embedding": Kind({"target_modules": ["c_fc", "wte"], "fan_in_fan_out": True}, model="gpt2"),
    "no task type": Kind({"task_type": None}),
    "a task type on one side": Kind(second={"task_type": None}),
    "the name of Unsloth's patch": Kind(change_second=config(auto_mapping={
        "base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True,
    })),
    "gaussian A": Kind({"init_lora_weights": "gaussian"}),
    "bfloat16": Kind(change=dtype(torch.bfloat16)),
    "float16 on one side": Kind(change_second=dtype(torch.float16)),
    "names of adapters": Kind(change=renamed(lambda k: k.replace(".weight", ".default.weight"))),
    "another adapter's name": Kind(change_second=renamed(lambda k: k.replace(".weight", ".me.weight"))),
    "torch.compile": Kind(WRAPPED, change=inside("_orig_mod")),
    "torch.compile on one side": Kind(WRAPPED, change_second=inside("_orig_mod")),
    "DDP inside": Kind(WRAPPED, change=inside("module")),
    "DDP outside": Kind(change=renamed(lambda k: f"module.{k}")),
    "compiled DDP": Kind(WRAPPED, change=inside("_orig_mod.module")),
    "FSDP": Kind(change=renamed(lambda k: k.replace("layers.0.", "layers.0._fsdp_wrapped_module."))),
    "checkpointed": Kind(change=renamed(lambda k: k.replace("self_", "_checkpoint_wrapped_module.self_"))),
    "a compiled PeftModel": Kind(change=renamed(lambda k: f"_orig_mod.{k}")),
    "a whole compiled head": Kind({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
                                  change=inside("_orig_mod")),
    "unset fields of tomorrow": Kind(change=config(use_tomorrow=False, tomorrow_config=None)),
    "saved embeddings that nobody trained": Kind(change=added(f"{EMBED}.weight", 32, 8)),
    # refused
    "two adapters in a file": Kind(change_second=lambda d: [
        renamed(lambda k: k.replace("lora_A.", "lora_A.one.").replace("lora_B.", "lora_B.two."))(d)
    ], refused="holds the adapters one, two"),
    "two spellings of a name": Kind(change_second=lambda d: [
        added("base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight", 2, 8)(d)
    ], refused="are one name without their wrappers"),
    "saved embeddings that differ": Kind(
        change=added(f"{EMBED}.weight", 32, 8), change_second=added(f"{EMBED}.weight", 32, 8, value=2.0),
        refused="embed_tokens.weight, saved beside the adapters but not adapted, differs",
    ),
    "another task": Kind(change_second=config(task_type="SEQ_CLS"), refused="task_type is 'CAUSAL_LM' in"),
    "a class of another task": Kind(change_second=config(
        task_type=None, auto_mapping={"base_model_class": "LlamaForSequenceClassification"}
    ), refused="is a LlamaForSequenceClassification"),
    "a head on one side": Kind({"modules_to_save": None}, {"modules_to_save": ["lm_head"]},
                               refused="lm_head.weight (modules_to_save) is missing"),
    "DoRA": Kind({"use_dora": True}, refused="use_dora = true"),
    "all biases": Kind({"bias": "all"}, refused="bias = 'all'"),
    "biases of layers": Kind({"bias": "lora_only"}, refused="bias = 'lora_only'"),
    "a bias of B": Kind({"lora_bias": True, "target_modules": ["c_fc"]}, model="gpt2",
                        refused="lora_bias = true"),
    "PiSSA": Kind({"init_lora_weights": "pissa"}, refused="init_lora_weights = 'pissa'"),
    "OLoRA": Kind({"init_lora_weights": "olora"}, refused="init_lora_weights = 'olora'"),
    "parameters": Kind({"target_parameters": ["mlp.up_proj.weight"]}, refused="target_parameters"),
    "tokens": Kind({"trainable_token_indices": [1, 2]}, refused="trainable_token_indices"),
    "replicated layers": Kind({"layer_replication": [[0, 2], [0, 2]]}, refused="layer_replication"),
    "IA3": Kind(make=lambda **_: peft.IA3Config(
        target_modules=["k_proj"], feedforward_modules=[]), refused="peft_type = 'IA3'"),
    "LoHa": Kind(make=lambda **_: peft.LoHaConfig(target_modules=["q_proj"]), refused="peft_type = 'LOHA'"),
    "VeRA": Kind(make=lambda **_: peft.VeraConfig(target_modules=["q_proj"]), refused="peft_type = 'VERA'"),
    "prompts": Kind(make=lambda **_: peft.PromptTuningConfig(
        num_virtual_tokens=2, task_type="CAUSAL_LM"), refused="peft_type = 'PROMPT_TUNING'"),
    "a pickle": Kind(change_second=pickled, refused="a pickle can run any code"),
    "pieces": Kind(change_second=sharded, refused="adapter_model-00001-of-00001.safetensors, which PEFT"),
    "adapters in folders": Kind(change_second=moved_inside, refused="name one of its own: german"),
    "a method of tomorrow": Kind(change_second=config(use_tomorrow=True), refused="use_tomorrow = true"),
    "kohya": Kind(change_second=renamed(lambda k: "lora_unet_" + k.replace("lora_A", "lora_down")),
                  refused="a name of kohya"),
    "diffusers": Kind(change_second=renamed(lambda k: k.replace("base_model.model.", "unet.")),
                      refused="a name of diffusers"),
    "MLX": Kind(change_second=renamed(lambda k: k.replace("base_model.model.", "").replace(
        ".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")), refused="a name of MLX"),
    "rank 0": Kind(change_second=lambda d: [edit_config(d, r=0)], refused="rank 0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root, found = tmp_path_factory.mktemp("bases"), {}
    for name, (kind, made) in MODELS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kind(copy.deepcopy(made)).save_pretrained(root / name)
        found[name] = root / name
    return found


def merged(model: Any) -> dict[str, Tensor]:
    """The weights of PEFT's merged model, by the names of the base."""
    return {n: p.detach().double() for n, p in copy.deepcopy(model).merge_and_unload().named_parameters()}


def opened(name: str, base: Path) -> Any:
    return MODELS[name][0].from_pretrained(base, dtype=torch.float32)


def trained(kind: Kind, base: Path, directory: Path, seed: int, **fields: Any) -> Any:
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            opened(kind.model, base), kind.make(**{**settings, **kind.both, **fields})
        )
        for name, tensor in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                tensor.data = (torch.randn(tensor.shape) * 0.3).bfloat16().float()  # exact in halves
    model.save_pretrained(directory)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", KINDS)
def test_every_kind_of_adapter_is_right_or_refused(
    what: str, bases: Mapping[str, Path], tmp_path: Path
) -> None:
    kind = KINDS[what]
    base, out = bases[kind.model], tmp_path / "out"
    saved = [tmp_path / "one", tmp_path / "two"]
    models = [trained(kind, base, d, k, **(kind.second if k else {})) for k, d in enumerate(saved)]
    for directory in saved:
        kind.change(directory)
    kind.change_second(saved[1])
    result = aggregate("--strategy", "flora", "--weights=3,1", "--out", out, *saved)
    if kind.refused:
        refused(result, kind.refused)
        assert not out.exists()
        return
    assert result.exit_code == 0, result.stderr
    start = {n: p.detach().double() for n, p in opened(kind.model, base).named_parameters()}
    both = [merged(model) for model in models]
    reloaded = peft.PeftModel.from_pretrained(opened(kind.model, base), out)
    if what.startswith("saved embeddings"):
        start |= {"model.embed_tokens.weight": torch.ones(32, 8).double()}
        both = [m | {"model.embed_tokens.weight": torch.ones(32, 8).double()} for m in both]
    given = merged(reloaded)
    assert given.keys() == start.keys()
    for name, weight in start.items():
        wanted = weight + sum(p * (m[name] - weight) for p, m in zip(P, both, strict=True))
        torch.testing.assert_close(given[name], wanted, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(given[name], weight) for name, weight in start.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = aggregate("--strategy", "flora", "--base", base, "--out", tmp_path / "again", out)
    assert again.exit_code == 0, again.stderr
    config_file = "adapter_config.json"
    assert (tmp_path / "again" / config_file).read_bytes() == (out / config_file).read_bytes()
