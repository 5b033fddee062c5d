"""``fedlora privacy audit``: one private run with canaries, attacked by the server and by the public.

The run is the configuration's own: its rounds, its rule, and its clients' private training, in this process.
Only the ledger is another, which is thrown away. Clients hold disjoint examples, so that the run as a whole
is (epsilon, delta)-DP for every example of every client, epsilon being the largest that a client claims;
therefore the canaries of all clients may be pooled, and the bound is one on that largest epsilon.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clients.evaluation import evaluate
from fedlora.audit.attack import Bound, bound_of
from fedlora.audit.bounds import shared_confidence
from fedlora.audit.canaries import FACTORS, HEAD, Design
from fedlora.audit.grid import AuditGrid
from fedlora.audit.membership import Membership, membership
from fedlora.audit.views import ServerView, final_scores
from fedlora.config import RunConfig
from fedlora.core.state import State
from fedlora.errors import ConfigError
from fedlora.server.callbacks import Tell
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.validate import check
from fedlora.simulation.in_process import InProcessEngine, InProcessSession
from fedlora.simulation.simulate import quiet

SERVER, FINAL = "server", "final-model"
CANARIES = 512
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What was found.

    Attributes:
        strategy: the rule.
        optimizer: the clients' optimiser.
        clients: how many took part.
        draws: batches that a canary in the data was in, as expected, of the client with the fewest.
        claimed_epsilon: the largest epsilon that a client's ledger claims.
        target_delta: delta of claim and bounds.
        confidence: probability with which all bounds hold together.
        bounds: view -> group of tensors -> what the attack shows; a view that cannot be measured is left out.
        unmeasured: why the final model was not attacked; empty if it was.
        membership: the attack on real examples; None where there is no global model.
    """

    strategy: str
    optimizer: str
    clients: int
    draws: float
    claimed_epsilon: float
    target_delta: float
    confidence: float
    bounds: dict[str, dict[str, Bound]]
    unmeasured: str
    membership: Membership | None

    @property
    def strongest(self) -> tuple[str, str, Bound]:
        """View, group and bound that show most."""
        found = [(view, group, b) for view, groups in self.bounds.items() for group, b in groups.items()]
        return max(found, key=lambda entry: entry[2].epsilon)

    @property
    def refuted(self) -> bool:
        """Whether the claim is disproved, at the confidence."""
        return self.strongest[2].epsilon > self.claimed_epsilon


def audit(
    config: RunConfig,
    *,
    canaries: int = CANARIES,
    confidence: float = CONFIDENCE,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Audit:
    """Train privately with canaries, attack, and compare with what the clients claim.

    Args:
        config: a run with ``privacy.mode = "example"``.
        canaries: of each group (factors, head), over all clients.
        confidence: of all bounds together.
        progress: told about each round.

    Raises:
        ConfigError: nothing that could be audited, see `check_audit`.
        RunFailed: the run stopped.
    """
    check_audit(config, canaries, confidence)
    config = audited(config)
    quiet()
    with tempfile.TemporaryDirectory(prefix="fedlora-audit-") as directory:
        home = Path(directory)
        session = InProcessSession(InProcessEngine(), config, home / "clients")
        federation = FederatedRun(session, RunDirectory(home / "run"), [Tell(progress)] if progress else [])
        design = design_of(federation, canaries)
        view = ServerView(design, _exposure(federation))
        before = federation.state
        result = federation.run(AuditGrid(session.runtime, session.config, design, view, home / "clients"))
    return Audit(
        strategy=config.strategy.name,
        optimizer=config.train.optimizer,
        clients=len(view.rounds),
        draws=min(rounds * view.exposure[p] for p, rounds in view.rounds.items()),
        claimed_epsilon=float(result["epsilon"]),
        target_delta=config.privacy.target_delta,
        confidence=confidence,
        bounds=_bounds(federation, view, before, confidence),
        unmeasured=unmeasured(federation),
        membership=None if federation.personal else _membership(federation),
    )


def check_audit(config: RunConfig, canaries: int, confidence: float) -> None:
    """Refuse what cannot be audited.

    Raises:
        ConfigError: no example-level privacy, clients that ship nothing, a mode that keeps no per-example
            gradients, or numbers out of range.
    """
    rule = check(config)
    if config.privacy.mode != "example":
        raise ConfigError(f'privacy.mode = {config.privacy.mode!r}: an audit needs "example"')
    if config.privacy.grad_sample_mode != "hooks":
        raise ConfigError(
            f"privacy.grad-sample-mode = {config.privacy.grad_sample_mode!r}: an audit adds gradients of its "
            'own to those of the examples, which only "hooks" keeps'
        )
    if not rule.facts.uploaded and config.model.head != "train":
        raise ConfigError(f"strategy.name = {config.strategy.name!r}: clients send nothing, so nothing leaks")
    if canaries < 8:
        raise ConfigError(f"--canaries {canaries}: must be >= 8")
    if not 0 < confidence < 1:
        raise ConfigError(f"--confidence {confidence:g}: must be in (0, 1)")


def audited(config: RunConfig) -> RunConfig:
    """The same run without what an audit does not look at, on a ledger that is thrown away."""
    return replace(
        config,
        output_dir="",
        evaluate_every=config.num_server_rounds,
        strategy=replace(config.strategy, diagnostics=False),
        privacy=replace(config.privacy, ledger="", dataset_id=""),
    )


def design_of(federation: FederatedRun, canaries: int) -> Design:
    """So many canaries in each group over all clients, as far as the shipped tensors have dimensions."""
    config, clients = federation.config, sorted(federation.partitions)
    each = -(-canaries // len(clients))
    dimensions = _dimensions(federation)
    return Design(
        counts={group: min(each, most) for group, most in dimensions.items() if most},
        clients=clients,
        seed=config.seed,
        max_grad_norm=config.privacy.max_grad_norm,
    )


def _dimensions(federation: FederatedRun) -> dict[str, int]:
    """The fewest numbers of each group that a client ships in a round."""
    config, rule, state = federation.config, federation.strategy.rule, federation.state
    broadcasts = [
        rule.broadcast(replace(state, round=done), federation.strategy.client_spec(partition))
        for partition in federation.partitions
        for done in range(config.num_server_rounds)
    ]
    factors = [
        sum(b.adapters[n].tensors()[x].numel() for n in b.modules for x in b.uploaded & b.trained)
        for b in broadcasts
    ]
    head = sum(tensor.numel() for tensor in state.head.values())
    return {FACTORS: min(factors), HEAD: head}


def _exposure(federation: FederatedRun) -> dict[int, float]:
    config, data = federation.config, federation.runtime.data
    return {
        p: config.local_steps_of(p) * config.train.batch_size / len(data.indices(p))
        for p in federation.partitions
    }


def unmeasured(federation: FederatedRun) -> str:
    """Why the final model cannot be attacked along the clients' directions; empty if it can."""
    facts, config = federation.strategy.rule.facts, federation.config
    ranks = {config.rank_of(p) for p in federation.partitions}
    if not facts.mean or facts.rotates_basis or len(ranks) > 1:
        return f"{facts.name} publishes no mean of what is shipped, in the clients' own coordinates"
    return ""


def _bounds(
    federation: FederatedRun, view: ServerView, before: State, confidence: float
) -> dict[str, dict[str, Bound]]:
    groups = list(view.design.counts)
    views = [SERVER] if unmeasured(federation) else [SERVER, FINAL]
    each = shared_confidence(confidence, len(groups) * len(views))
    delta = federation.config.privacy.target_delta
    bounds: dict[str, dict[str, Bound]] = {name: {} for name in views}
    for group in groups:
        scores, coins = view.pooled(group)
        bounds[SERVER][group] = bound_of(scores, coins, delta, each)
        if FINAL in views:
            scores = final_scores(view, group, before, federation.state)
            bounds[FINAL][group] = bound_of(scores, coins, delta, each)
    return bounds


def _membership(federation: FederatedRun) -> Membership:
    """By the loss of the final model; the clients' examples are the members."""
    runtime, data = federation.runtime, federation.runtime.data
    runtime.load_state(federation.state)
    members = np.concatenate([data.indices(p) for p in sorted(federation.partitions)])
    inside = evaluate(runtime.model, data.train, members, data.pad_token_id)
    outside = evaluate(runtime.model, data.test, np.arange(len(data.test)), data.pad_token_id)
    return membership(-inside.losses, -outside.losses)
