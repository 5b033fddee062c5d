"""Second adapters of clients (`clients.personal`): where they can stand, and what each gains by its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from clients.by_input import has_inputs
from clients.personal import GLOBAL_ACCURACY
from fedlora.config import RunConfig
from fedlora.errors import NotApplicable
from fedlora.server.records import BY_CLIENT, personal_summary, worst_decile
from fedlora.tasks import Task, task_named
from strategies.rule import Rule

PERSONAL = "personal"
"""Key of these figures in a record."""
GLOBAL_BY_CLIENT = "accuracy_of_global_by_client"


def check_second(config: RunConfig, rule: Rule, keeps: str) -> None:
    """Refuse second adapters where there is no global one for them to stand beside.

    Args:
        config: of a run that has them.
        rule: of the run.
        keeps: what clients keep without them, see `fedlora.server.validate.kept`.

    Raises:
        NotApplicable: another kind of adapter, a rule without a global one, clients that keep a part already,
            a best round that is to be gone back to, or rounds that do not wait; weights by an input without a
            second adapter, or of a task that it does not know.
    """
    if config.lora.personal_weights == "input":
        weights = "lora.personal-weights = 'input'"
        if not config.lora.personal_rank:
            raise NotApplicable(f"{weights}: weighs a second adapter, lora.personal-rank is 0")
        if not has_inputs(task_named(config.task)):
            raise NotApplicable(
                f"{weights}: task = {config.task!r}, accepted are those with labels, instruction"
            )
    key = f"lora.personal-rank = {config.lora.personal_rank}"
    if config.lora.method != "lora":
        raise NotApplicable(f"{key}: is of lora, the run has lora.method = {config.lora.method!r}")
    if keeps:
        raise NotApplicable(f"{key}: clients keep {keeps} already")
    if not rule.facts.global_adapter:
        raise NotApplicable(f"{key}: {rule.facts.name} makes no global adapter for a second to stand beside")
    if config.load_best_model_at_end:
        raise NotApplicable(f"{key}: load-best-model-at-end = true: clients' own are those of the last round")
    if not config.devices.waits:
        raise NotApplicable(f"{key}: what clients keep to themselves needs rounds that wait")


def second_summary(
    metrics: Mapping[int, Mapping[str, float]], domain_names: Sequence[str], task: Task
) -> dict[str, Any]:
    """Clients' evaluations as part of a record: their own models, the global one, and gains.

    The gain of a client is the accuracy of its own model less that of the global one, both on the test
    examples of the domains that it holds. Nothing where nobody told both.

    Args:
        metrics: by partition.
        domain_names: of the data.
        task: of the run.
    """
    wanted = {"accuracy", "loss", GLOBAL_ACCURACY}
    told = {p: m for p, m in metrics.items() if wanted <= m.keys()}
    if not told:
        return {}
    beside = {str(p): m[GLOBAL_ACCURACY] for p, m in sorted(told.items())}
    found = personal_summary(told, domain_names, task)
    gains = [found[BY_CLIENT][client] - beside[client] for client in beside]
    return {
        PERSONAL: {
            **found,
            GLOBAL_BY_CLIENT: beside,
            "gain_over_global": fmean(gains),
            "gain_over_global_worst_decile": worst_decile(gains),
        }
    }
