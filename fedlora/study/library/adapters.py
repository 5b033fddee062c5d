"""Saved adapters: aggregated, opened, evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.config import AnyPath
from fedlora.errors import ConfigError
from fedlora.study.library.given import name_of, number_of, numbers_of, path_of, paths_of, refused

if TYPE_CHECKING:
    from fedlora.evaluation.loaded import LoadedAdapter
    from fedlora.merge.aggregate import Outcome


def aggregate(
    adapters: Sequence[AnyPath],
    out: AnyPath,
    *,
    strategy: str = "fedavg",
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    base: AnyPath | None = None,
    merge: bool = False,
    max_rank: int = 0,
    reduce_intruders: float | None = None,
) -> Outcome:
    """One round of a strategy over saved PEFT adapters; one adapter, or one merged model.

    Args:
        adapters: directories that PEFT's ``save_pretrained`` wrote.
        out: the directory to write.
        strategy: a rule's name, or ``module:Class``.
        options: the rule's options.
        weights: one for each adapter; None weighs them equally.
        base: the directory of their base model, to check their layers and to merge.
        merge: write the base with the update inside.
        max_rank: cut the adapter to this rank, by SVD; 0 leaves it as it is.
        reduce_intruders: the share of each intruder dimension that is left, see `fedlora.core.intruders`.

    Raises:
        ConfigError: adapters or options that do not fit; nothing was written.
        RunFailed: the result could not be written.
    """
    from fedlora.merge.aggregate import Request
    from fedlora.merge.aggregate import aggregate as carry_out

    here, share = "fedlora.aggregate: ", reduce_intruders
    if not isinstance(options or {}, Mapping):
        raise refused(f"{here}options", options, "a mapping, such as {'lam': 0.5}")
    request = Request(
        adapters=paths_of(f"{here}adapters", adapters),
        strategy=name_of(f"{here}strategy", strategy),
        options=dict(options or {}),
        weights=None if weights is None else numbers_of(f"{here}weights", weights),
        base=None if base is None else path_of(f"{here}base", base),
        merge=merge,
        out=path_of(f"{here}out", out),
        max_rank=number_of(f"{here}max_rank", max_rank, int),
        reduce_intruders=None if share is None else number_of(f"{here}reduce_intruders", share),
    )
    if not request.adapters:
        raise ConfigError(f"{here}adapters = []: must be a list of at least one path")
    return carry_out(request)


def load(adapter: AnyPath) -> LoadedAdapter:
    """An adapter that a run wrote, ready to ``predict`` labels or to ``generate`` text.

    Raises:
        ConfigError: no adapter that fedlora wrote, or a base that is not here.
        AssetError: a built-in base that could not be fetched.
    """
    from fedlora.evaluation.loaded import LoadedAdapter

    return LoadedAdapter(path_of("fedlora.load: adapter", adapter))


def evaluate(
    adapter: AnyPath, data: AnyPath, *, text_column: str = "text", label_column: str = "label"
) -> dict[str, Any]:
    """Accuracy, loss, accuracy by domain and number of examples of an adapter that fedlora wrote.

    Args:
        adapter: its directory.
        data: a built-in dataset or hub id (its test examples), or a file (all its rows).
        text_column: the column with the text.
        label_column: the column with the label.

    Raises:
        ConfigError: no adapter there, no such data, or labels that the adapter does not know.
    """
    from fedlora.evaluation.adapter import evaluate_adapter

    where = path_of("fedlora.evaluate: adapter", adapter)
    name = name_of("fedlora.evaluate: data", data)
    return evaluate_adapter(where, name, text_column=text_column, label_column=label_column)
