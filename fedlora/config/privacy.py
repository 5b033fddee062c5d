"""The ``[privacy]`` table: what is hidden, and at what price."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.config.checks import one_of, require


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyConfig:
    """Differential privacy: of each client's own training (Opacus DP-SGD), or of whole clients."""

    mode: str = "none"
    """``none``; ``example``: one example more or less at a client is hidden from its server; ``client``: one
    client is hidden in the global model, from everybody but the server."""
    target_epsilon: float = 8.0
    """Budget of a client over all that is on its ledger, > 0; the noise is calibrated to it."""
    target_delta: float = 1e-5
    """Delta of that budget, in (0, 1)."""
    noise_multiplier: float = 0.0
    """Noise standard deviation / clipping norm; 0 means: calibrate to ``privacy.target-epsilon``."""
    max_grad_norm: float = 1.0
    """``example``: each example's gradient is clipped to this norm, > 0."""
    clipping_norm: float = 1.0
    """``client``: all that a client changed is clipped to this norm, > 0."""
    clipping: str = "flat"
    """``flat``: all trained tensors together; ``per-layer``: each of L tensors to max-grad-norm / sqrt(L)."""
    grad_sample_mode: str = "hooks"
    """``hooks`` keeps each example's gradient, ``ghost`` only its norm and goes back twice (less memory)."""
    max_physical_batch_size: int = 0
    """Examples of a drawn batch that are in memory at once; 0 means all of them."""
    max_participations: int = 0
    """Rounds in which one client may train at most; 0 means all of them. The server enforces it."""
    accountant: str = "prv"
    """``prv``, ``pld`` (Google's, as tight) or ``rdp`` (a looser bound)."""
    release_metrics: bool = False
    """Also send the training loss and the example count, which are not private."""
    dataset_id: str = ""
    """The owner's name for the data, under which its spending is written down; empty means by ``data``."""
    ledger: str = ""
    """Directory of the spending, shared by all runs that name it; empty means the run's or node's own."""

    def __post_init__(self) -> None:
        one_of("privacy.mode", self.mode, ("none", "example", "client"))
        one_of("privacy.accountant", self.accountant, ("prv", "rdp", "pld"))
        require(
            self.target_epsilon > 0, "privacy.target-epsilon", self.target_epsilon,
            'must be > 0 (use privacy.mode = "none" to train without privacy)',
        )  # fmt: skip
        require(0 < self.target_delta < 1, "privacy.target-delta", self.target_delta, "must be in (0, 1)")
        require(self.noise_multiplier >= 0, "privacy.noise-multiplier", self.noise_multiplier, "must be >= 0")
        require(self.max_grad_norm > 0, "privacy.max-grad-norm", self.max_grad_norm, "must be > 0")
        require(self.clipping_norm > 0, "privacy.clipping-norm", self.clipping_norm, "must be > 0")
        one_of("privacy.clipping", self.clipping, ("flat", "per-layer"))
        one_of("privacy.grad-sample-mode", self.grad_sample_mode, ("hooks", "ghost"))
        require(
            self.clipping == "flat" or self.grad_sample_mode == "hooks",
            "privacy.clipping", self.clipping, 'must be "flat" where privacy.grad-sample-mode = "ghost"',
        )  # fmt: skip
        require(
            self.max_physical_batch_size >= 0,
            "privacy.max-physical-batch-size", self.max_physical_batch_size, "must be >= 0",
        )  # fmt: skip
        require(
            self.max_participations >= 0,
            "privacy.max-participations", self.max_participations, "must be >= 0",
        )  # fmt: skip

    @property
    def private(self) -> bool:
        """Clients train by DP-SGD."""
        return self.mode == "example"

    @property
    def client_level(self) -> bool:
        """The server clips and noises whole updates."""
        return self.mode == "client"
