"""PEFT's other tuners as kinds of adapters: their trained tensors travel by name, the rest is drawn alike.

A tuner is one entry of `TUNERS`: PEFT's configuration, which of its fields ``lora.rank`` and its like are,
and which tensors have the role "A". PEFT itself computes with them, and loads what is exported.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.adapters import TURNS, Adapters, NamedTensors, check_same_shapes
from fedlora.core.factors import AdapterSet, Tensors
from fedlora.core.seeding import derive, drawn_from
from fedlora.core.state import ModuleSpec
from fedlora.errors import ConfigError, first_line

ACTIVE = "default"
"""PEFT's name of the only adapter."""
SETTLED = frozenset({
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "target_parameters", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out", "peft_version",
})  # fmt: skip
"""Fields that every tuner's configuration may have and that fedlora settles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """One of PEFT's tuners.

    Attributes:
        name: the value of ``lora.method``.
        config: the name of its configuration in PEFT.
        paper: citation.
        rank, alpha, dropout: which fields ``lora.rank``, ``lora.alpha`` and ``lora.dropout`` are; empty
            where it has none.
        seed: the field that draws what is not trained.
        settings: fields as fedlora has them, unlike PEFT, for instance to start at W_0.
        mask: which weights are trained: called with a layer and the rank, 1 in the shape of its weight.
        input_side: the names in the role "A"; all others have the role "B".
    """

    name: str
    config: str
    paper: str
    rank: str = ""
    alpha: str = ""
    dropout: str = ""
    seed: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    mask: Callable[..., Tensor] | None = None
    input_side: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that ``lora.method-options`` may set."""
        own = {self.rank, self.alpha, self.dropout, self.seed, *self.settings, *SETTLED}
        return tuple(f.name for f in dataclasses.fields(self.config_type) if f.name not in own)

    @property
    def config_type(self) -> Any:
        """PEFT's class."""
        import peft

        return getattr(peft, self.config)


def smallest_weights(layer: nn.Linear, rank: int, **_: Any) -> Tensor:
    """SaRA's mask: 1 at the ``rank (in + out)`` weights of W_0 that are nearest to zero, (out, in).

    The paper's is all weights below a threshold; here their number is SHiRA's. Whoever has W_0 has it.
    """
    weight = layer.weight.detach()
    chosen = weight.abs().flatten().argsort(stable=True)[: rank * sum(weight.shape)]
    return torch.zeros_like(weight).flatten().index_fill_(0, chosen, 1.0).view_as(weight)


TUNERS = {
    tuner.name: tuner
    for tuner in (
        Tuner(
            name="vera", config="VeraConfig", paper="Kopiczko et al., ICLR 2024, arXiv 2310.11454",
            rank="r", dropout="vera_dropout", seed="projection_prng_key", input_side=("vera_lambda_d",),
        ),
        Tuner(
            name="randlora", config="RandLoraConfig", paper="Albert et al., ICLR 2025, arXiv 2502.00987",
            rank="r", alpha="randlora_alpha", dropout="randlora_dropout", seed="projection_prng_key",
            input_side=("randlora_gamma",),
        ),
        Tuner(
            name="fourierft", config="FourierFTConfig", paper="Gao et al., ICML 2024, arXiv 2405.03003",
            seed="random_loc_seed", settings={"init_weights": True},
        ),
        Tuner(
            name="waveft", config="WaveFTConfig", paper="Bilican et al., 2025, arXiv 2505.12532",
            seed="random_loc_seed",
        ),
        Tuner(
            name="c3a", config="C3AConfig", paper="Chen et al., ACL 2025, arXiv 2407.19342",
            settings={"init_weights": True},
        ),
        Tuner(
            name="shira", config="ShiraConfig", paper="Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175",
            rank="r", seed="random_seed",
        ),
        Tuner(
            name="sara", config="ShiraConfig", paper="Hu et al., ICLR 2025, arXiv 2409.06633",
            rank="r", settings={"random_seed": 0}, mask=smallest_weights,
        ),
        Tuner(
            name="ia3", config="IA3Config", paper="Liu et al., NeurIPS 2022, arXiv 2205.05638",
            settings={"feedforward_modules": []},
        ),
        Tuner(
            name="loha", config="LoHaConfig", paper="Hyeon-Woo et al., ICLR 2022, arXiv 2108.06098",
            rank="r", alpha="alpha", input_side=("hada_w1_a", "hada_w1_b", "hada_w2_a"),
        ),
        Tuner(
            name="lokr", config="LoKrConfig", paper="Yeh et al., ICLR 2024, arXiv 2309.14859",
            rank="r", alpha="alpha", input_side=("lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        ),
        Tuner(
            name="hira", config="HiraConfig", paper="Huang et al., ICLR 2025",
            rank="r", dropout="hira_dropout", input_side=("hira_A",),
        ),
        Tuner(
            name="gralora", config="GraloraConfig", paper="Jung et al., 2025, arXiv 2505.20355",
            rank="r", alpha="alpha", dropout="gralora_dropout", input_side=("gralora_A",),
        ),
        Tuner(
            name="miss", config="MissConfig", paper="Kang, Yin, 2024, arXiv 2409.15371",
            rank="r", dropout="miss_dropout",
        ),
        Tuner(
            name="psoft", config="PsoftConfig", paper="Wu et al., 2025, arXiv 2505.11235",
            rank="r", alpha="psoft_alpha", dropout="psoft_dropout",
            settings={"psoft_orth": False, "psoft_mag_a": False, "psoft_mag_b": False},
        ),
    )
}  # fmt: skip
"""By ``lora.method``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunerKind:
    """A tuner with the settings of a run.

    Attributes:
        tuner: which.
        rank, alpha, dropout: of the configuration, as far as the tuner has them.
        options: ``lora.method-options`` as JSON with sorted keys.
        seed: of the run, from which everything that is drawn is drawn.
    """

    tuner: Tuner = field(hash=False)
    rank: int
    alpha: float
    dropout: float
    options: str
    seed: int

    @property
    def name(self) -> str:
        return self.tuner.name

    def inject(
        self, module: nn.Module, modules: Mapping[str, ModuleSpec], *, fan_in_fan_out: bool
    ) -> InjectedTuner:
        """See `AdapterKind.inject`."""
        try:
            return InjectedTuner(self, module, modules, fan_in_fan_out)
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            raise ConfigError(
                f"lora.method = {self.name!r}: PEFT refuses it here, {first_line(error)}"
            ) from None

    def config(self, modules: Mapping[str, ModuleSpec], fan_in_fan_out: bool) -> Any:
        """PEFT's configuration."""
        tuner = self.tuner
        known = {f.name for f in dataclasses.fields(tuner.config_type)}
        given = {tuner.rank: self.rank, tuner.alpha: self.alpha, tuner.dropout: self.dropout}
        fields: dict[str, Any] = {key: value for key, value in given.items() if key}
        if tuner.seed:
            fields[tuner.seed] = derive(self.seed, "adapter", self.name) % 2**31
        if "fan_in_fan_out" in known:
            fields["fan_in_fan_out"] = fan_in_fan_out
        elif fan_in_fan_out:
            raise ValueError("it has no place for Conv1D, whose weight is (in, out)")
        config = tuner.config_type(
            target_modules=list(modules), **tuner.settings, **fields, **json.loads(self.options)
        )
        if tuner.mask is not None:
            config.mask_fn = tuner.mask
        return config


class InjectedTuner:
    """A tuner inside a model; see `fedlora.adapters.kind.InjectedAdapter`.

    Attributes:
        model: PEFT's wrapper, which shares the module.
        config: PEFT's configuration.
    """

    batched = False

    def __init__(
        self, kind: TunerKind, module: nn.Module, modules: Mapping[str, ModuleSpec], fan_in_fan_out: bool
    ) -> None:
        from peft import get_peft_model

        self._kind, self._module, self._modules = kind, module, modules
        self.config = kind.config(modules, fan_in_fan_out)
        with warnings.catch_warnings(), drawn_from(kind.seed, "adapter"):
            warnings.simplefilter("ignore")
            self.model: Any = get_peft_model(module, self.config, ACTIVE)
        first = {name: self._first(name) for name in modules}
        by_side = [a.parts[side] for side in ("B", "A") for a in first.values()]
        turns = tuple(dict.fromkeys(name for names in by_side for name in names))
        self._start = {name: replace(a, parts={**a.parts, TURNS: turns}) for name, a in first.items()}

    def start(self) -> Adapters:
        """Start by PEFT's initialisation, from the seed of the run."""
        return self._start

    def check_rank(self, rank: int, key: str = "lora.rank") -> None:
        """Left to PEFT, which has made the layers."""

    def check(self, adapters: Adapters) -> None:
        """Refuse other tensors or shapes than the layers have."""
        for name, adapter in adapters.items():
            check_same_shapes(self._start[name], adapter, name)

    def activate(self, adapters: Adapters, dropout: float, beside: AdapterSet | None = None) -> None:
        """The layers have one shape, and their dropout from the beginning; nothing stands beside."""

    def parameters(self, module: str) -> dict[str, nn.Parameter]:
        """Trained parameters of a layer, by PEFT's names without that of the adapter."""
        layer = self._module.get_submodule(module)
        return {
            name.replace(f".{ACTIVE}", "", 1): p
            for name, p in layer.named_parameters()
            if f".{ACTIVE}" in name and not name.startswith("base_layer.")
        }

    def scaling(self, module: str) -> float:
        """One: a tuner scales by itself."""
        return 1.0

    def adapters(self, tensors: Mapping[str, Tensors]) -> dict[str, NamedTensors]:
        """The start with these values."""
        return {module: self._start[module].replaced(own) for module, own in tensors.items()}

    def dropouts(self) -> Iterator[nn.Dropout]:
        """Those of the tuner, if it has any."""
        if self._kind.tuner.dropout:
            for module in self._modules:
                held = getattr(self._module.get_submodule(module), self._kind.tuner.dropout)[ACTIVE]
                if isinstance(held, nn.Dropout):
                    yield held

    def saved(self) -> tuple[Any, Tensors]:
        """PEFT's configuration and all that PEFT saves, with what is drawn and not trained."""
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(self.model, adapter_name=ACTIVE, save_embedding_layers=False)
        return self.config, dict(found)

    def _first(self, module: str) -> NamedTensors:
        values = {
            n: p.detach().to("cpu", torch.float32, copy=True) for n, p in self.parameters(module).items()
        }
        inputs = tuple(name for name in values if name in self._kind.tuner.input_side)
        outputs = tuple(name for name in values if name not in inputs)
        rank = self._kind.rank
        return NamedTensors(values, rank, self._kind.alpha / rank, {"A": inputs, "B": outputs})
