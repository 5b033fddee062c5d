"""Private training within a client's own budget: decide, reserve what it costs, train, say what is spent.

The ledger is the client's (`fedlora.privacy.ledger`): it outlives rounds, runs and restarts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clients.ledger_ref import LedgerRef, example_of, ledger_of
from clients.runtime import ClientRuntime
from clients.training.canaries import Canaries
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_sgd import check_private, train_private
from clients.training.schedule import Stage
from clients.training.self_check import self_check
from clients.training.train import LocalResult
from fedlora.config import RunConfig, TrainConfig
from fedlora.config.privacy import ADD_OR_REMOVE_ONE
from fedlora.errors import OwnDataRefused
from fedlora.prepared.node_data import UNREADABLE
from fedlora.privacy.calibration import calibrate_noise, warn_of_delta
from fedlora.privacy.filter import Budget
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.spending import Release
from fedlora.privacy.types import CLIENT, NeighboringRelation, PrivacySpent

BOOKKEEPING = (
    "neighboring_relation", "target_epsilon", "target_delta", "max_participations", "accountant",
    "dataset_id", "ledger", "noise_bands",
)  # fmt: skip
"""Keys of ``privacy`` that do not change the bits of a release."""
ADDED = {
    "declared_examples": 0, "method_options": "", "optimizer_options": "",
    "schedule": "constant", "schedule_over": "round", "schedule_floor": 0.0, "warmup_steps": 0,
    "unit_column": "", "max_unit_examples": 16, "adapter": "",
    "micro_batch_size": 0, "pass_memory": 0.0, "packing": False,
    "target_quantile": 0.5, "clip_learning_rate": 0.2, "count_noise": 0.0, "clip_shares": "",
    "dtype": "float32", "dpo_beta": 0.1, "alternating": False, "nested_ranks": False,
    "gradient": "backward", "perturbation_size": 0.001, "control_variates": False,
    "sketch_size": 0, "personal_rank": 0, "personal_weights": "one",
}  # fmt: skip
"""Keys that came after releases had been charged; at this default they mean what their absence meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRelease:
    """A release that is decided but neither charged nor made.

    Attributes:
        config: the run.
        ledger: the client's.
        release: what will be charged.
        mechanism: of a private step; None where training is plain, and what leaves the client has noise.
        ledger_ref: a head that the ledger had, and the owner's limits.
    """

    config: RunConfig
    ledger: Ledger
    release: Release
    mechanism: Mechanism | None
    ledger_ref: LedgerRef

    def reserve(self) -> PrivacySpent:
        """Charge it: what the client has spent in this run by then, on disk when this returns.

        Raises:
            BudgetExceeded: it would cost more than is left.
            LedgerRefused: the ledger cannot be relied upon, or must not be resolved for this data.
        """
        privacy, ref = self.config.privacy, self.ledger_ref
        standing = self.ledger.reserve(
            self.release,
            Budget(
                target_epsilon=privacy.target_epsilon,
                target_delta=privacy.target_delta,
                accountant=privacy.accountant,
            ),
            planned_steps=0 if privacy.noise_multiplier else planned_steps(self.config, self.release.steps),
            known_head=ref.known_head,
            max_delta=ref.max_delta,
            max_epsilon=ref.max_epsilon,
            set_aside=ref.set_aside,
        )
        return PrivacySpent.of(standing, self.release)

    def released(self) -> None:
        """Note that it was made."""
        self.ledger.released(self.release)


def plan_release(
    runtime: ClientRuntime,
    config: RunConfig,
    ledger_ref: LedgerRef,
    *,
    partition_id: int,
    server_round: int,
    local_steps: int,
    seed: int | None,
    start: str = "",
    cohort: Sequence[int] = (),
) -> PlannedRelease:
    """One round of DP-SGD, decided.

    The noise is calibrated on the client's own count of examples or units, or on the one that is declared for
    it, for the most rounds that the server lets it take part in (``privacy.max-participations``, else all of
    them), as if nothing was spent before.

    Args:
        runtime: the model and the data.
        config: the run.
        ledger_ref: where the client keeps its ledger, and for which run.
        partition_id: whose budget.
        server_round: names the release.
        local_steps: steps of this round.
        seed: of the batches and the noise; None draws both from the operating system.
        start: a digest of the values that training starts from; where there is a seed.
        cohort: who trains together, on which the last bits depend; empty where the client trains alone.

    Raises:
        LedgerRefused: the ledger cannot be read.
        OwnDataRefused: more examples than are declared.
        ConfigError: a configuration that DP-SGD does not cover.
    """
    privacy, train = config.privacy, config.train_of(partition_id)
    rate = rate_of(config, partition_id, runtime.data.num_protected(partition_id))
    check_private(train, rate)
    if seed is None:  # the owner's log; a simulation has said so at its start
        what = "units" if privacy.unit_column else "examples"
        warn_of_delta(privacy.target_delta, round(train.batch_size / rate), what)
    noise = noise_of(config, rate, local_steps)
    ledger = ledger_of(ledger_ref.directory, config, runtime.data, partition_id)
    settings = [*_settings(config, train), noise, rate, runtime.model.device, *cohort]
    release = Release(
        run_key=ledger_ref.run_key,
        server_round=server_round,
        partition_id=partition_id,
        noise_multiplier=noise,
        sample_rate=rate,
        steps=local_steps,
        neighboring_relation=NeighboringRelation(privacy.neighboring_relation),
        unit=privacy.unit_column,
        cut=example_of(config, runtime.data),
        determined_by="" if seed is None else _digest(seed, start, ledger.dataset.fingerprint, *settings),
    )
    mechanism = Mechanism.of(privacy, train.batch_size, noise_multiplier=noise, secure=seed is None)
    return PlannedRelease(
        config=config,
        ledger=ledger,
        release=release,
        mechanism=mechanism,
        ledger_ref=ledger_ref,
    )


def plan_whole(
    runtime: ClientRuntime,
    config: RunConfig,
    ledger_ref: LedgerRef,
    *,
    partition_id: int,
    server_round: int,
    noise_multiplier: float,
    seed: int | None,
    start: str = "",
    cohort: Sequence[int] = (),
) -> PlannedRelease:
    """One round of plain training, of which all that leaves the client has noise for all of its data.

    Arguments are those of `plan_release`, and the multiplier of that noise.
    """
    ledger = ledger_of(ledger_ref.directory, config, runtime.data, partition_id)
    settings = [
        *_settings(config, config.train_of(partition_id)),
        noise_multiplier,
        runtime.model.device,
        *cohort,
    ]
    secure = _as_charged(config.secure)
    release = Release(
        run_key=ledger_ref.run_key,
        server_round=server_round,
        partition_id=partition_id,
        noise_multiplier=noise_multiplier,
        sample_rate=1.0,
        steps=1,
        unit=CLIENT,
        determined_by=""
        if seed is None
        else _digest(seed, start, ledger.dataset.fingerprint, secure, *settings),
    )
    return PlannedRelease(
        config=config, ledger=ledger, release=release, mechanism=None, ledger_ref=ledger_ref
    )


def train_within_budget(
    runtime: ClientRuntime, plan: PlannedRelease, *, seed: int | None, canaries: Canaries | None = None
) -> tuple[LocalResult, PrivacySpent]:
    """Carry out a plan with the loaded model, and say what the client has spent by then.

    The self-test comes before the charge: a model that fails it costs nobody anything.

    Args:
        runtime: the model, loaded, and the data.
        plan: what is decided.
        seed: as for the plan.
        canaries: what an audit hides among the examples.

    Raises:
        BudgetExceeded, LedgerRefused: see `PlannedRelease.reserve`.
        RunFailed: a private step does not compute what it claims on this model.
    """
    assert plan.mechanism is not None
    self_check(runtime.model, runtime.data.pad_token_id, plan.mechanism)
    spent = plan.reserve()
    config = plan.config
    result = train_private(
        runtime.model,
        runtime.data.train,
        runtime.data.indices(plan.release.partition_id),
        runtime.data.pad_token_id,
        config.train_of(plan.release.partition_id),
        local_steps=plan.release.steps,
        mechanism=plan.mechanism,
        seed=seed or 0,
        release_loss=config.privacy.release_metrics,
        canaries=canaries,
        sample_rate=plan.release.sample_rate,
        stage=Stage(plan.release.server_round, config.num_server_rounds),
    )
    plan.released()
    return result, spent


def rate_of(config: RunConfig, partition_id: int, num_protected: int) -> float:
    """The probability with which an example is in a batch: batch size / public number of examples.

    Under ``add_or_remove_one`` the public number is declared, and the real one decides nothing. With
    ``privacy.unit-column`` units are counted and declared, not examples.

    Raises:
        OwnDataRefused: there are more than are declared.
    """
    declared, batch_size = config.privacy.declared_examples, config.train_of(partition_id).batch_size
    if config.privacy.neighboring_relation != ADD_OR_REMOVE_ONE:
        return batch_size / num_protected
    if num_protected > declared:
        raise OwnDataRefused(
            f"declared-examples = {declared}: there are {num_protected}, declare at least as many", UNREADABLE
        )
    return batch_size / declared


def noise_of(config: RunConfig, sample_rate: float, local_steps: int) -> float:
    """The given noise multiplier, or the one that reaches the target epsilon after the most rounds."""
    privacy = config.privacy
    return privacy.noise_multiplier or calibrate_noise(
        privacy.target_epsilon,
        privacy.target_delta,
        sample_rate,
        planned_steps(config, local_steps),
        privacy.accountant,
    )


def planned_steps(config: RunConfig, local_steps: int) -> int:
    """The most steps that the server lets a client take in this run."""
    return local_steps * (config.privacy.max_participations or config.num_server_rounds)


def _settings(config: RunConfig, train: TrainConfig) -> list[Any]:
    mechanism = {key: v for key, v in _as_charged(config.privacy).items() if key not in BOOKKEEPING}
    return [mechanism, config.task, *map(_as_charged, (config.model, config.lora, train))]


def _as_charged(section: Any) -> dict[str, Any]:
    """A section as it was before there were keys that are at their default: they change no bit."""
    return {key: v for key, v in dataclasses.asdict(section).items() if (key, v) not in ADDED.items()}


def _digest(*parts: object) -> str:
    text = json.dumps([*parts, torch.__version__], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
