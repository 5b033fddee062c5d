"""Weights from a directory or the hub: read whole and finite, or refused in one line.

transformers draws what a checkpoint lacks at random, and says so in a report alone. Here a classification
head and a pooler alone may be drawn: a base with random layers is no pretrained model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig

from fedlora.errors import ConfigError, FedLoraError, first_line, named_line

BROKEN = "a Git LFS pointer and half a download look like this"
DRAWN = "drawn_by_transformers"
"""Attribute of a network: names of the parameters that its checkpoint lacks."""
LOCAL_CODE = {"trust_remote_code": False}
"""Code that comes with weights is never run, nor asked about."""


@contextmanager
def one_line(where: str, expected: str = "") -> Iterator[None]:
    """Inside, whatever transformers raises over somebody's files becomes a `ConfigError`.

    Args:
        where: what begins the line, ``model.name = 'x'`` or ``--base x``.
        expected: what is accepted there, said where nothing was found or its kind does not fit.
    """
    try:
        yield
    except (FedLoraError, MemoryError):
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error)
        raise ConfigError(f"{where}: {expected} ({reason})" if expected else f"{where}: {reason}") from None
    except Exception as error:  # of safetensors, pickle, torch, a config's own constructor
        hint = f"; {BROKEN}" if type(error).__name__ in ("SafetensorError", "UnpicklingError") else ""
        raise ConfigError(f"{where}: it cannot be loaded ({named_line(error)}{hint})") from None


def pretrained(
    kind: Any,
    source: Any,
    where: str,
    expected: str,
    *,
    labels: int = 0,
    new_head: bool = False,
    dtype: str = "float32",
) -> Any:
    """The pretrained network.

    Args:
        kind: one of transformers' Auto classes.
        source: a directory or a hub id.
        where: what begins a refusal, ``model.name = 'x'``.
        expected: what is accepted there.
        labels: of its classification head; 0 where it has none.
        new_head: a head for another number of labels is drawn anew instead of being refused.
        dtype: of its numbers, torch's name; ``auto`` is that of the files.

    Raises:
        ConfigError: nothing there, of another kind, not whole, of other shapes, or not finite.
    """
    with one_line(where, expected):
        config = AutoConfig.from_pretrained(source, **LOCAL_CODE)
        if labels:
            config.num_labels = labels
        network, report = kind.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True,
            **LOCAL_CODE,
        )  # fmt: skip
    for name, there, wanted in sorted(report["mismatched_keys"]):
        _check_shape(network, where, name, tuple(there), tuple(wanted), labels, new_head)
    lacking = sorted(name for name in report["missing_keys"] if not (labels and _may_be_drawn(network, name)))
    lacking = [name for name in lacking if "pooler" not in name.split(".")]
    if lacking:
        raise ConfigError(
            f"{where}: its files lack {len(lacking)} of the model's tensors, {lacking[0]} for one; they are "
            "of another architecture than its config.json says, or not all there"
        )
    check_finite(network, where)
    setattr(network, DRAWN, tuple(sorted(report["missing_keys"])))
    return network


def check_finite(network: Any, where: str) -> None:
    """Refuse weights with NaN or infinity, which make every result NaN.

    Raises:
        ConfigError: there are some.
    """
    for name, tensor in network.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ConfigError(f"{where}: its {name} holds NaN or infinity")


def _may_be_drawn(network: Any, name: str) -> bool:
    """Whether a tensor stands outside the pretrained base: it is the task's own."""
    return not name.startswith(f"{network.base_model_prefix}.")


def _check_shape(
    network: Any, where: str, name: str, there: tuple[int, ...], wanted: tuple[int, ...], labels: int,
    new_head: bool,
) -> None:  # fmt: skip
    if not labels or not _may_be_drawn(network, name):
        raise ConfigError(f"{where}: its {name} is {there}, by its config.json it should be {wanted}")
    if not new_head:
        raise ConfigError(
            f"{where}: its own head has another number of labels than the data ({name} is {there}, "
            f'{labels} labels want {wanted}); model.pooling = "mean" takes a new head'
        )
