"""The ``[privacy]`` table: what is hidden, and at what price."""

from __future__ import annotations

import json
import math
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fedlora.config.checks import require
from fedlora.config.section import section

ZERO_OUT_ONE, ADD_OR_REMOVE_ONE = "zero_out_one", "add_or_remove_one"
MAX_DELTA = 0.01
"""Largest accepted delta: beyond it, one example in a hundred may be given away whole."""


@section("privacy.")
class PrivacyConfig:
    """Differential privacy: of each client's own training (Opacus DP-SGD), or of whole clients."""

    mode: Literal["none", "example", "client"] = "none"
    """``none``; ``example``: one example more or less at a client is hidden from its server; ``client``: one
    client is hidden in the global model, from everybody but the server, and with ``secure.noise`` from it."""
    neighboring_relation: Literal["zero_out_one", "add_or_remove_one"] = "zero_out_one"
    """``example``: neighbours differ by an example that is replaced by nothing, and the number of examples is
    public (``zero_out_one``), or by one more or less, the number hidden (``add_or_remove_one``)."""
    declared_examples: NonNegativeInt = 0
    """``add_or_remove_one`` in simulation: the public number that stands for that of every client, not below
    it; sample rate and noise go by it. A node's owner declares its own, see ``docs/privacy.md``."""
    unit_column: str = ""
    """``example``: the column that says whose an example is, for instance ``author``: what is hidden is all
    that a person has at a client, not one example. ``:row``: each row of the data is a unit, of conversations
    too. Empty: each example. A node's owner names the column of its own data."""
    max_unit_examples: PositiveInt = 16
    """With ``unit-column``: examples of one unit in a step at most; of more, so many are drawn each time.
    Their mean gradient is clipped."""
    target_epsilon: Annotated[float, Field(gt=0), 'use privacy.mode = "none" to train without privacy'] = 8.0
    """Budget of a client over all that is on its ledger; the noise is calibrated to it."""
    target_delta: Annotated[float, Field(gt=0, le=MAX_DELTA)] = 1e-5
    """Delta of that budget; it should be well below 1 / examples."""
    noise_multiplier: NonNegativeFloat = 0.0
    """Noise standard deviation / clipping norm; 0 means: calibrate to ``privacy.target-epsilon``."""
    max_grad_norm: PositiveFloat = 1.0
    """``example``: each example's gradient is clipped to this norm."""
    clipping_norm: PositiveFloat = 1.0
    """``client``: all that a client changed is clipped to this norm."""
    clipping: Literal["flat", "per-layer", "adaptive"] = "flat"
    """``flat``: all trained tensors together; ``per-layer``: each of L tensors to max-grad-norm / sqrt(L);
    ``adaptive``: together, to a norm that follows a quantile of the norms, found privately."""
    clip_shares: str = ""
    """``per-layer``: JSON object of budget shares by group, for instance ``{"A": 1, "B": 2, "head": 1}``;
    groups are factors, ``head``, parts of layers' names, and ``rest``. Empty: all tensors alike."""
    target_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """``adaptive``: the share of norms that is to lie within the clipping norm."""
    clip_learning_rate: PositiveFloat = 0.2
    """``adaptive``: how fast it follows, from ``clipping-norm``, or each round from ``max-grad-norm`` on."""
    count_noise: NonNegativeFloat = 0.0
    """``adaptive``: standard deviation of the noise on the count of norms within; 0: a twentieth of the
    cohort or batch, at least 5 times the noise multiplier. It is paid for by more noise on the sum."""
    grad_sample_mode: Literal["hooks", "ghost", "loop"] = "hooks"
    """``hooks`` keeps each example's gradient, ``ghost`` only its norm and goes back twice (less memory),
    ``loop`` goes back once for each example: for a ``lora.method`` of which Opacus sees nothing."""
    max_physical_batch_size: NonNegativeInt = 0
    """Examples of a drawn batch that are in memory at once; 0 means all of them."""
    max_participations: NonNegativeInt = 0
    """Rounds in which one client may train at most; 0 means all of them. The server enforces it."""
    noise_bands: Annotated[PositiveInt, Field(le=1000)] = 1
    """``client``: noise is correlated over so many rounds, so that most of it cancels in the model, and a
    client takes part at most once in so many (banded matrix factorisation); 1: it is independent."""
    accountant: Literal["prv", "rdp", "pld"] = "prv"
    """``prv``, ``pld`` (Google's, as tight) or ``rdp`` (a looser bound)."""
    release_metrics: bool = False
    """Also send the training loss and the example count, which are not private."""
    dataset_id: str = ""
    """The owner's name for the data, under which its spending is written down, for instance ``notes-2025``;
    empty means by ``data``."""
    ledger: str = ""
    """Directory of the spending, shared by all runs that name it, for instance ``ledger``; empty means the
    run's or node's own."""

    def __post_init__(self) -> None:
        self._check_relation()
        self._check_units()
        self._check_shares()
        require(
            self.clipping == "flat" or self.grad_sample_mode != "ghost",
            "privacy.clipping", self.clipping, 'must be "flat" where privacy.grad-sample-mode = "ghost"',
        )  # fmt: skip
        require(
            self.noise_bands == 1 or self.client_level,
            "privacy.noise-bands", self.noise_bands, "must be 1 unless privacy.mode = 'client'",
        )  # fmt: skip

    def _check_relation(self) -> None:
        relation = self.neighboring_relation
        if relation == ZERO_OUT_ONE:
            require(
                self.declared_examples == 0, "privacy.declared-examples", self.declared_examples,
                f"must be 0 where privacy.neighboring-relation = {ZERO_OUT_ONE!r}, whose number is public",
            )  # fmt: skip
            return
        require(
            not self.client_level, "privacy.neighboring-relation", relation,
            f"must be {ZERO_OUT_ONE!r} where privacy.mode = 'client'",
        )  # fmt: skip
        require(
            not (self.private and self.release_metrics), "privacy.release-metrics", self.release_metrics,
            f"must be false where privacy.neighboring-relation = {relation!r}, it sends the number",
        )  # fmt: skip

    def _check_shares(self) -> None:
        if not self.clip_shares:
            return
        try:
            found = json.loads(self.clip_shares)
        except ValueError:
            found = None
        numbers = isinstance(found, dict) and all(
            type(share) in (int, float) and 0 < share < math.inf for share in found.values()
        )
        require(
            bool(found) and numbers, "privacy.clip-shares", self.clip_shares,
            'must be a JSON object of groups and numbers > 0, for instance {"A": 1, "rest": 2}',
        )  # fmt: skip
        require(
            self.clipping == "per-layer", "privacy.clip-shares", self.clip_shares,
            f'takes privacy.clipping = "per-layer", which is {self.clipping!r}',
        )  # fmt: skip
        require(
            not self.client_level, "privacy.clip-shares", self.clip_shares,
            "must be empty where privacy.mode = 'client', whose updates are clipped whole",
        )  # fmt: skip

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """Groups and their shares of the budget, in order; empty where all tensors are alike."""
        return tuple((group, float(s)) for group, s in json.loads(self.clip_shares or "{}").items())

    def _check_units(self) -> None:
        if not self.unit_column:
            return
        require(
            not self.client_level, "privacy.unit-column", self.unit_column,
            "must be empty where privacy.mode = 'client', which hides whole clients",
        )  # fmt: skip
        require(
            self.grad_sample_mode != "ghost", "privacy.grad-sample-mode", self.grad_sample_mode,
            "must be 'hooks' or 'loop' with privacy.unit-column, examples' norms tell none of a unit's mean",
        )  # fmt: skip
        require(
            not 0 < self.max_physical_batch_size < self.max_unit_examples,
            "privacy.max-physical-batch-size", self.max_physical_batch_size,
            f"must be 0 or at least privacy.max-unit-examples, which is {self.max_unit_examples}",
        )  # fmt: skip

    @property
    def private(self) -> bool:
        """Clients train by DP-SGD."""
        return self.mode == "example"

    @property
    def granularity(self) -> str:
        """What is hidden: ``none``, ``example``, ``unit`` or ``client``."""
        return "unit" if self.private and self.unit_column else self.mode

    @property
    def unit_examples(self) -> int:
        """Examples of one unit in a private step at most; 0 where each example is a unit by itself."""
        return self.max_unit_examples if self.unit_column else 0

    @property
    def client_level(self) -> bool:
        """The server clips and noises whole updates."""
        return self.mode == "client"
