"""Whether adapters belong to one base model, and how it is to be called where they are written again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

from fedlora.errors import ConfigError
from fedlora.models.card import AdapterCard, absolute
from fedlora.models.peft_files import PeftAdapter
from fedlora.tasks import task_named

NAME = "base_model_name_or_path"
NAMES = (NAME, "revision")
"""How a base is called: one model may have several names, which only its user can know."""
CLASSES_OF = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
}
"""The classes that each of PEFT's task types opens, by model type."""


def common_identity(members: Sequence[PeftAdapter], base: Path | None) -> Mapping[str, Any]:
    """The base in PEFT's fields; a local directory by its absolute path.

    A task type or a class that one adapter does not say is that of the others.

    Args:
        members: at least one adapter.
        base: the model that all belong to, where the user names it: then they may name it as they like.

    Raises:
        ConfigError: different bases.
    """
    first = members[0]
    named = {key: first.config.identity[key] for key in NAMES} | {NAME: absolute(first.config.identity[NAME])}
    for other in members[1:]:
        for key in NAMES:
            mine, others = first.config.identity[key], other.config.identity[key]
            same = absolute(mine) == absolute(others) if key == NAME else mine == others
            if same:
                continue
            if base is None:
                hint = " (if that is one model, name it with --base)"
                raise ConfigError(_differ(first, other, key, mine, others) + hint)
            named = {NAME: str(base.absolute()), "revision": None}
        _check_cards(first, other)
    return {**named, **_common_kind(members)}


def _common_kind(members: Sequence[PeftAdapter]) -> dict[str, Any]:
    """The task type and the class of the base, each from an adapter that says it."""
    tasks = [(m, m.config.identity["task_type"]) for m in members]
    tasks = [(m, task) for m, task in tasks if task is not None]
    maps = [(m, m.config.identity["auto_mapping"]) for m in members]
    classes = [(m, (value or {}).get("base_model_class")) for m, value in maps]
    classes = [(m, name) for m, name in classes if name is not None]
    for key, said in (("task_type", tasks), ("auto_mapping", classes)):
        for member, value in said[1:]:
            if value != said[0][1]:
                raise ConfigError(_differ(said[0][0], member, key, said[0][1], value))
    if tasks and classes:
        (speaker, task), (other, name) = tasks[0], classes[0]
        known = CLASSES_OF[task].values()
        everything = {each for table in CLASSES_OF.values() for each in table.values()}
        if name in everything and name not in known:
            raise ConfigError(
                f"adapters of different base models: task_type is {task!r} in {speaker.path}, "
                f"the base of {other.path} is a {name}"
            )
    mapping = None if tasks else next((value for _, value in maps if value is not None), None)
    if len({str(value) for _, value in maps}) == 1:
        mapping = maps[0][1]
    return {"task_type": tasks[0][1] if tasks else None, "auto_mapping": mapping}


def _differ(first: PeftAdapter, other: PeftAdapter, key: str, mine: object, others: object) -> str:
    return f"adapters of different base models: {key} is {mine!r} in {first.path}, {others!r} in {other.path}"


def _check_cards(first: PeftAdapter, other: PeftAdapter) -> None:
    """Refuse cards of different bases: of another ``task``, ``label_names`` in their order, or model.

    Of the model those keys count that make its weights: ``name``, ``pooling``, ``dtype``, ``quantization``.
    Of ``seed`` too, where it drew the head: of a classifier whose adapter does not bring one. Elsewhere the
    seed draws nothing that stays. ``max_length``, ``assistant_loss``, ``dpo_beta`` and the chat template say
    how examples were read, ``model.head`` and ``model.adapter`` where training began: in those adapters may
    differ, and the result has the first one's.
    """
    if first.card is None and other.card is None:
        return
    if first.card is None or other.card is None:
        there = first.card and "there", other.card and "there"
        raise ConfigError(_differ(first, other, "fedlora.json", *there))
    drawn = task_named(first.card.task).labelled and not first.head
    mine, others = _of_the_base(first.card), _of_the_base(other.card)
    for key in mine:
        if mine[key] != others[key] and (drawn or key != "seed"):
            raise ConfigError(_differ(first, other, f"{key} in fedlora.json", mine[key], others[key]))


def _of_the_base(card: AdapterCard) -> dict[str, object]:
    """The keys of a card that make its base."""
    model = card.model
    return {
        "model.name": absolute(model.name),
        **{f"model.{key}": getattr(model, key) for key in ("pooling", "dtype", "quantization")},
        **{key: getattr(card, key) for key in ("task", "label_names", "seed")},
    }
