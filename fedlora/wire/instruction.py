"""The training instruction: what travels to a client, and what the client must hold besides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedlora.core.adapters import Adapters, lora_set, tensor_names
from fedlora.core.base_patches import Patch
from fedlora.core.factors import LoraFactors, Tensors
from fedlora.core.init_drawn import fresh_adapters
from fedlora.core.peft_keys import from_peft
from fedlora.core.seeding import torch_stream
from fedlora.core.state import Broadcast, ModuleSpec, RankRegularizer
from fedlora.errors import FactorShapeError, UpdateRefused
from fedlora.wire.arrays import ARRAYS, CONFIG, PARTS, from_record, is_packed, to_record
from fedlora.wire.upload import CODECS, UploadCodec
from fedlora.wire.validation import check_settings


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Digests of the parts that a client must hold to carry out an instruction.

    Attributes:
        base: the base patches P_1 .. P_v in order.
        frozen: the factors of `fedlora.wire.broadcast.frozen_tensors`; empty if there are none.
        moving: the factors of `moving_tensors` there, where the client held them when the instruction was
            made; else empty, and they travel unnamed.
        layers: in place of these two, where layers or directions rest: the parts of `layer_parts` there that
            rest, and those that move and were held when the instruction was made.
        sum_of: what the first patch is the sum of, where the client held all that; it need not travel then.
    """

    base: tuple[str, ...] = ()
    frozen: str = ""
    moving: str = ""
    layers: tuple[str, ...] = ()
    sum_of: tuple[str, ...] = ()

    @cached_property
    def digests(self) -> tuple[str, ...]:
        return (*self.base, *filter(None, (self.frozen, self.moving)), *self.layers)


@dataclass(frozen=True, kw_only=True)
class TrainInstruction:
    """A decoded training message; what its settings say is read once.

    Attributes:
        server_round: from 1.
        arrays: what travelled, in PEFT's spelling.
        parts: digest -> named tensors of a base patch that travelled.
        needs: everything the client must hold.
        config: the plain settings (``rank``, ``scaling``, ``trained``, ...).
        packed: its tensors travelled in one array, and so may those of the reply.
        named: the name of the record that holds the arrays.
    """

    server_round: int
    arrays: Tensors
    parts: dict[str, Tensors]
    needs: Needs
    config: dict[str, Any]
    packed: bool = False
    named: str = ARRAYS

    @cached_property
    def identity(self) -> str:
        """Identity of the instruction, which a reply repeats."""
        return identity(self.config)

    @cached_property
    def tensors(self) -> frozenset[str]:
        """The names of a layer's tensors, where its adapter is none of LoRA; else empty."""
        return names(self.config.get("tensors", ""))

    @cached_property
    def trained(self) -> frozenset[str]:
        return names(self.config["trained"])

    @cached_property
    def uploaded(self) -> frozenset[str]:
        return names(self.config["uploaded"])

    @cached_property
    def choose(self) -> int:
        """Directions that count, of those that were trained; 0: all."""
        return int(self.config.get("choose", 0))

    @cached_property
    def codec(self) -> UploadCodec:
        """The codec of the reply's arrays."""
        return CODECS[str(self.config.get("upload", "float32"))]

    def coded(self, start: Tensors, trained: Tensors) -> Tensors:
        """The arrays of the reply, as that codec writes what was trained from ``start``."""
        generator = torch_stream(int(self.config.get("upload-seed", 0)), "upload")
        return self.codec.encode(start, trained, generator, int(self.config.get("upload-turn", 0)))

    def left_out(self, start: Tensors, trained: Tensors) -> Tensors:
        """What the reply does not tell of ``trained``; nothing where the server will refuse it."""
        try:
            told = self.codec.decode(start, self.coded(start, trained))
        except UpdateRefused:
            return {}
        return {name: tensor - told[name] for name, tensor in trained.items()}

    @cached_property
    def tail(self) -> RankRegularizer | None:
        """Regularizer of the client's loss, if any."""
        if "tail-weight" not in self.config:
            return None
        return RankRegularizer(weight=float(self.config["tail-weight"]), start=int(self.config["tail-start"]))


def identity(config: Mapping[str, Any]) -> str:
    """Names the round that an instruction belongs to, among the rounds of all runs.

    >>> identity({"server-round": 3, "run-key": "5e1f"})
    'round 3 of run 5e1f'
    """
    return f"round {config['server-round']} of run {config.get('run-key', '-')}"


def names(text: str) -> frozenset[str]:
    """A comma string as a set."""
    return frozenset(filter(None, text.split(",")))


INSTRUCTION_KEYS = frozenset(
    {
        "rank",
        "scaling",
        "trained",
        "uploaded",
        "modules",
        "needs-base",
        "needs-frozen",
        "needs-moving",
        "needs-layers",
        "base-sum-of",
    }
    | {"tail-weight", "tail-start", "fresh", "moves-base", "tensors"}
    | {"upload", "upload-seed", "upload-turn", "choose"}
)
"""The settings that a strategy writes: nobody else's may have these names."""


def instruction_config(broadcast: Broadcast, needs: Needs, init_a: str) -> dict[str, Any]:
    """The plain settings of an instruction, as a ConfigRecord can carry them."""
    first = next(iter(broadcast.adapters.values()))
    config: dict[str, Any] = {
        "rank": first.whole_rank if isinstance(first, LoraFactors) else first.rank,
        "scaling": first.scaling,
        "trained": ",".join(sorted(broadcast.trained)),
        "uploaded": ",".join(sorted(broadcast.uploaded)),
        "modules": json.dumps(sorted(broadcast.modules)),
        "needs-base": list(needs.base),
        "needs-frozen": needs.frozen,
    }
    if needs.moving:
        config["needs-moving"] = needs.moving
    if needs.layers:
        config["needs-layers"] = list(needs.layers)
    if needs.sum_of:
        config["base-sum-of"] = list(needs.sum_of)
    if not isinstance(first, LoraFactors):
        config["tensors"] = ",".join(sorted(tensor_names(broadcast.adapters)))
    if broadcast.updates_base:
        config["moves-base"] = True
    if broadcast.tail is not None:
        config |= {"tail-weight": broadcast.tail.weight, "tail-start": broadcast.tail.start}
    if broadcast.choose:
        config["choose"] = broadcast.choose
    if broadcast.fresh_seed is not None:
        shapes = {name: list(f.shape) for name, f in lora_set(broadcast.adapters).items()}
        config["fresh"] = json.dumps({"seed": broadcast.fresh_seed, "init-a": init_a, "shapes": shapes})
    return config


def parts_record(
    patches: Mapping[str, Patch], dtype: str = "float32", *, packed: bool = False
) -> ArrayRecord:
    """Base patches by digest, as one record; in float32 if a sum is among them."""
    tensors = {f"{d}/{name}": t for d, patch in patches.items() for name, t in patch.tensors().items()}
    exact = any(patch.sum_of for patch in patches.values())
    return to_record(tensors, "float32" if exact else dtype, packed=packed)


def decode_instruction(content: RecordDict) -> TrainInstruction:
    """The instruction in a training message.

    What names a file at the client (run, digests) is held to names that lead nowhere else.

    Raises:
        UpdateRefused: a record is missing, an array cannot be decoded, or a setting is not one.
    """
    arrays, settings = _names(content)
    if arrays not in content.array_records or settings not in content.config_records:
        raise UpdateRefused(f"the message lacks a record {ARRAYS!r} or {CONFIG!r}")
    config: dict[str, Any] = dict(content.config_records[settings])
    check_settings(config)
    parts: dict[str, Tensors] = {}
    if PARTS in content.array_records:
        for key, tensor in from_record(content.array_records[PARTS]).items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
    return TrainInstruction(
        server_round=config["server-round"],
        arrays=from_record(content.array_records[arrays]),
        parts=parts,
        needs=Needs(
            base=tuple(config.get("needs-base", [])),
            frozen=config["needs-frozen"],
            moving=config.get("needs-moving", ""),
            layers=tuple(config.get("needs-layers", [])),
            sum_of=tuple(config.get("base-sum-of", [])),
        ),
        config=config,
        packed=is_packed(content.array_records[arrays]),
        named=arrays,
    )


def instruction_settings(content: RecordDict) -> ConfigRecord | None:
    """Settings of a message's instruction, whatever their record is called; None where there is none."""
    return next((r for r in content.config_records.values() if "needs-frozen" in r), None)


def _names(content: RecordDict) -> tuple[str, str]:
    """Names of the records of arrays and of settings: the usual ones, or those of the app."""
    arrays = [name for name in content.array_records if name != PARTS]
    settings = [name for name, record in content.config_records.items() if "needs-frozen" in record]
    return (arrays[0], settings[0]) if len(arrays) == len(settings) == 1 else (ARRAYS, CONFIG)


def complete_adapters(instruction: TrainInstruction, held: Tensors) -> tuple[Adapters, Tensors]:
    """The starting adapter and head of an instruction, from what travelled, what is held, and fresh draws.

    Raises:
        UpdateRefused: a module has only some of its factors.
    """
    parts = from_peft({**held, **instruction.arrays}, instruction.tensors)
    rank, scaling = int(instruction.config["rank"]), float(instruction.config["scaling"])
    if "fresh" in instruction.config:
        fresh = json.loads(instruction.config["fresh"])
        specs = {n: ModuleSpec(out_features=o, in_features=i) for n, (o, i) in fresh["shapes"].items()}
        return fresh_adapters(specs, rank, scaling, fresh["seed"], fresh["init-a"]), parts.head
    try:
        return parts.adapters(scaling, instruction.tensors, rank), parts.head
    except FactorShapeError as error:
        raise UpdateRefused(f"round {instruction.server_round}: {error}") from None
