"""``fedlora aggregate``: saved PEFT adapters in, one PEFT adapter or one merged model out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.core.files import check_place
from fedlora.core.intruders import intruders, reduced
from fedlora.core.parallel import one_thread
from fedlora.core.state import State
from fedlora.errors import ConfigError, system_errors_in_words
from fedlora.merge.group import AdapterGroup, gather
from fedlora.merge.merged_model import Base, of_base, open_base, write_merged
from fedlora.merge.one_round import Round, check_rule, check_weights, one_round
from fedlora.models.card import CARD_FILE, absolute
from fedlora.models.export import global_adapters, recompressed, write_adapter
from fedlora.models.layers import oriented
from fedlora.models.peft_config import CONFIG_FILE
from fedlora.models.peft_files import read_adapter
from fedlora.models.peft_names import TENSORS_FILE, WRAPPERS
from fedlora.models.same_base import NAME
from fedlora.models.serving import cut, vllm_says
from strategies.diagnostics import Diagnostics
from strategies.registry import make_rule
from strategies.rule import Rule

NOTICEABLE = 1e-3
"""A merged model that loses more of the update than this share to rounding says so."""
REPLACEABLE = frozenset({CONFIG_FILE, TENSORS_FILE, CARD_FILE, "README.md"})
"""What an adapter directory holds; one with anything else is never replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Request to aggregate saved adapters.

    Attributes:
        adapters: directories that ``save_pretrained`` wrote.
        strategy: the rule's name.
        options: the rule's options.
        weights: one weight for each adapter; None weighs them equally.
        base: the directory of the model that they belong to, to check their layers and to merge.
        merge: write the base with the update inside instead of an adapter.
        out: the directory to write; an adapter that is there is replaced.
        max_rank: of the adapter that is written; 0 means as the rule leaves it.
        reduce_intruders: the share of each intruder dimension that is left; None leaves them as they are.
    """

    adapters: Sequence[Path]
    strategy: str
    options: Mapping[str, Any]
    weights: Sequence[float] | None
    base: Path | None
    merge: bool
    out: Path
    max_rank: int = 0
    reduce_intruders: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Summary of an aggregation.

    Attributes:
        strategy: the rule.
        custom_weights: the rule weighs the adapters by itself.
        weights: with which the adapters counted, in their order, summing to 1; where the rule weighs each
            layer for itself, the mean over layers.
        ranks_in: the ranks of each adapter's modules, ascending.
        ranks_out: the ranks of the written adapter's modules, ascending; empty for a merged model.
        modules: how many layers are adapted.
        head: the averaged tensors of ``modules_to_save``.
        diagnostics: see `strategies.diagnostics`.
        notes: what else a user should know, a sentence each.
        energy_cut: share of the update's energy that ``max_rank`` lost.
        intruders: intruder dimensions, of how many singular vectors; None where not asked for.
    """

    strategy: str
    custom_weights: bool
    weights: Sequence[float]
    ranks_in: Sequence[tuple[int, ...]]
    ranks_out: tuple[int, ...]
    modules: int
    head: Sequence[str]
    diagnostics: Diagnostics
    notes: Sequence[str]
    energy_cut: float = 0.0
    intruders: tuple[int, int] | None = None


@one_thread()
def aggregate(request: Request) -> Outcome:
    """Read, check, aggregate, write; where anything is wrong, nothing is written.

    Raises:
        ConfigError: whatever the request, its adapters or its base make impossible.
        RunFailed: the result could not be written.
    """
    if "init_a" in request.options:
        raise ConfigError("--option init_a: nothing is drawn here, the adapters bring their A")
    rule = make_rule(request.strategy, request.options)
    check_rule(rule)
    _check_after(request)
    _check_out(request)
    group = gather([read_adapter(path) for path in request.adapters], request.base)
    weights = list(request.weights if request.weights is not None else [1.0] * len(group.members))
    check_weights(weights, group)
    base = _base(request, group)
    done = one_round(rule, group, weights)
    state, found = (done.state, None) if base is None else _with_fewer_intruders(request, done.state, base)
    with system_errors_in_words():
        ranks_out, energy_cut, writing = _write(request, group, state, base)
    return Outcome(
        strategy=rule.facts.name,
        custom_weights=rule.facts.custom_weights,
        weights=[sum(used) / len(done.used) for used in zip(*done.used.values(), strict=True)],
        ranks_in=[member.ranks for member in group.members],
        ranks_out=ranks_out,
        modules=len(group.modules),
        head=sorted(done.state.head),
        diagnostics=done.diagnostics,
        notes=[*_weighing(rule, request, done), *_notes(request, group, weights), *writing],
        energy_cut=energy_cut,
        intruders=found,
    )


def _base(request: Request, group: AdapterGroup) -> Base | None:
    path = request.base
    if path is None and request.merge:
        named = group.identity[NAME] if group.card is None else group.card.base_source()
        if not named or not Path(named).is_dir():
            raise ConfigError(
                f"--merge: the adapters' base is {named or 'not named'}, no local directory: give --base"
            )
        path = Path(named)
    weights = request.merge or request.reduce_intruders is not None
    return None if path is None else open_base(path, group, weights=weights)


def _check_after(request: Request) -> None:
    """Refuse what cannot be done to the result."""
    share = request.reduce_intruders
    if request.max_rank < 0:
        raise ConfigError(
            f"--max-rank {request.max_rank}: must be >= 1, or 0 for the rank that the rule leaves"
        )
    if request.max_rank and request.merge:
        raise ConfigError(f"--max-rank {request.max_rank}: a merged model has no rank, leave one out")
    if share is not None and not 0 <= share <= 1:
        raise ConfigError(f"--reduce-intruders {share}: must be from 0 (taken out) to 1 (left as they are)")
    if share is not None and request.base is None and not request.merge:
        raise ConfigError(f"--reduce-intruders {share}: compares with the base's weights, give --base")


def _with_fewer_intruders(request: Request, state: State, base: Base) -> tuple[State, tuple[int, int] | None]:
    """The state with its intruders reduced, and how many there were of how many."""
    share = request.reduce_intruders
    if share is None:
        return state, None
    adapters, count, top = dict(global_adapters(state)), 0, 0
    for name in state.adapters:
        layer, product = base.model.get_submodule(name), state.product(name)
        found = intruders(oriented(layer, layer.weight.detach()).float(), product)
        count, top = count + found.count, top + found.top
        if found.count:
            adapters[name] = recompressed(reduced(product, found, share))
    return replace(state, adapters=adapters, base=()), (count, top)


def _write(
    request: Request, group: AdapterGroup, state: State, base: Base | None
) -> tuple[tuple[int, ...], float, list[str]]:
    """Write the adapter, or the merged model; the ranks written, the energy cut off, and notes."""
    if base is None or not request.merge:
        shorter = cut(global_adapters(state), request.max_rank)
        adapters = shorter.adapters
        write_adapter(
            request.out, adapters, state.head, group.card,
            embeddings=group.embeddings,
            frozen=group.frozen,
            base=None if base is None else base.model.to("meta"),
            modules_to_save=group.modules_to_save or None,
            fan_in_fan_out=group.fan_in_fan_out,
            **group.identity,
        )  # fmt: skip
        served = [vllm_says(adapters, state.head)] if request.max_rank else []
        return tuple(sorted({factors.rank for factors in adapters.values()})), shorter.energy_lost, served
    products = {name: state.product(name) for name in state.adapters}
    lost = write_merged(request.out, base, products, state.head, of_base(group.frozen))
    dtype = str(base.model.dtype).removeprefix("torch.")
    note = f"the base is {dtype}: rounding changed the update by {100 * lost:.2g} % of its norm"
    return (), 0.0, [note] if lost > NOTICEABLE else []


def _weighing(rule: Rule, request: Request, done: Round) -> Iterator[str]:
    """Notes on weights and rule that correct what a user may expect."""
    facts = rule.facts
    if facts.custom_weights:
        ranges = [f"{min(used):.4f} to {max(used):.4f}" for used in zip(*done.used.values(), strict=True)]
        given = "--weights do not count" if request.weights is not None else "nothing else counts"
        heads = ", but for heads" if done.state.head else ""
        yield (
            f"{facts.name} weighs each layer by the norm of its update, {given}{heads}; "
            f"over layers: {', '.join(ranges)}"
        )
    if facts.first_round:
        yield f"one round of {facts.name} from zero is {facts.first_round}"


def _notes(request: Request, group: AdapterGroup, weights: Sequence[float]) -> Iterator[str]:
    if len({absolute(member.config.identity[NAME]) for member in group.members}) > 1:
        yield f"the adapters name different bases: all were taken to belong to {request.base}"
    for path, wrappers in group.wrapped.items():
        what = ", ".join(f"{WRAPPERS.get(name, 'DDP')} ({name}.)" for name in wrappers)
        yield f"{path}: taken off the names of its modules: {what}"
    named = group.identity[NAME]
    if named and named[0] in "./~" and not Path(named).is_dir():
        yield f"the adapters name {named!r} as their base, no directory from here: so does the result"
    for path, count in group.partial.items():
        yield f"{path} lacks {count} of {len(group.modules)} modules: no change there, its weight stays"
    for member, weight in zip(group.members, weights, strict=True):
        if weight == 0:
            yield f"{member.path} has weight 0: it was checked and counts for nothing"


def _check_out(request: Request) -> None:
    """Refuse a directory that cannot be written, or whose replacement would lose something."""
    out = request.out
    check_place("--out", out)
    if not out.exists():
        return
    here = out.resolve()
    for source in (*request.adapters, *([request.base] if request.base else [])):
        if here in (source.resolve(), *source.resolve().parents):
            raise ConfigError(f"--out {out}: {source} is read from there, name another directory")
    found = {entry.name for entry in out.iterdir()}
    if found and (request.merge or CONFIG_FILE not in found or not found <= REPLACEABLE):
        other = min(found - REPLACEABLE, default=CONFIG_FILE)
        raise ConfigError(
            f"--out {out}: is not empty (it has {other}): only a bare adapter is replaced by another"
        )
