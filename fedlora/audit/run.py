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
from typing import Any, cast

import numpy as np

from clients.evaluation import evaluate
from fedlora.audit.attack import Bound, bound_of
from fedlora.audit.bounds import shared_confidence
from fedlora.audit.canaries import FACTORS, HEAD, Design
from fedlora.audit.client_level import WithCanaries
from fedlora.audit.evidence import FALSE_ALARM, claimed_rate, flaws_of, separations_of
from fedlora.audit.grid import AuditGrid
from fedlora.audit.membership import Membership, membership
from fedlora.audit.separation import Expected, Separation, separation
from fedlora.audit.shared_noise import shared_sums
from fedlora.audit.views import ServerView, final_scores
from fedlora.config import RunConfig
from fedlora.config.section import by_field
from fedlora.core.state import State
from fedlora.errors import ConfigError
from fedlora.privacy.banded import most_participations
from fedlora.privacy.plausible import flaw_of_noise, flaw_of_pairs
from fedlora.server.callbacks import Tell
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.validate import check
from fedlora.simulation.in_process import InProcessEngine, InProcessSession
from fedlora.simulation.simulate import quiet
from strategies.client_dp import ClientDP

SERVER, FINAL, PUBLISHED, CLIENTS = "server", "final-model", "published means", "clients"
CANARIES = 512
CONFIDENCE = 0.95
REFUTED, STANDS, INCONCLUSIVE = "refuted", "stands", "inconclusive"


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
        separations: group -> how far its canaries stand apart, by the claim and really, and of all groups
            together; empty where the optimiser hides it.
        flaws: what of the draws and of the updates' noise does not fit the claim, in words.
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
    separations: dict[str, Separation]
    flaws: tuple[str, ...]
    unmeasured: str
    membership: Membership | None

    @property
    def strongest(self) -> tuple[str, str, Bound]:
        """View, group and bound that show most."""
        found = [(view, group, b) for view, groups in self.bounds.items() for group, b in groups.items()]
        return max(found, key=lambda entry: entry[2].epsilon)

    @property
    def found_wrong(self) -> list[str]:
        """Everything that is not what is claimed, in words."""
        apart = [f"{group}: {s.flaw}" for group, s in self.separations.items() if s.flaw]
        return [*apart, *self.flaws]

    @property
    def outcome(self) -> str:
        """`REFUTED`, `STANDS`, or `INCONCLUSIVE`: half the noise would not show, nor any leak refute."""
        if self.strongest[2].epsilon > self.claimed_epsilon or self.found_wrong:
            return REFUTED
        told = any(s.resolved for s in self.separations.values())
        return STANDS if told or self.strongest[2].largest > self.claimed_epsilon else INCONCLUSIVE


def audit(
    config: RunConfig,
    *,
    canaries: int = CANARIES,
    confidence: float = CONFIDENCE,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Audit:
    """Train privately with canaries, attack, and compare with what the clients claim.

    Args:
        config: a run with privacy.
        canaries: of each group (factors, head), over all clients; at client level made-up clients.
        confidence: of all bounds together.
        progress: told about each round.

    Raises:
        ConfigError: nothing that could be audited, see `check_audit`.
        RunFailed: the run stopped.
    """
    check_audit(config, canaries, confidence)
    quiet()
    if config.privacy.client_level:
        return _client_level(config, canaries, confidence, progress)
    config = audited(config)
    with tempfile.TemporaryDirectory(prefix="fedlora-audit-") as directory:
        home = Path(directory)
        session = InProcessSession(InProcessEngine(), config, home / "clients")
        federation = FederatedRun(session, RunDirectory(home / "run"), [Tell(progress)] if progress else [])
        design = design_of(federation, canaries)
        view = ServerView(design, _exposure(federation))
        before = federation.state
        nodes = AuditGrid(session.runtime, session.config, design.clients, home / "clients", view)
        result = federation.run(nodes)
    return Audit(
        strategy=config.strategy.name,
        optimizer=config.train.optimizer,
        clients=len(view.rounds),
        draws=min(rounds * view.exposure[p] for p, rounds in view.rounds.items()),
        claimed_epsilon=float(result["epsilon"]),
        target_delta=config.privacy.target_delta,
        confidence=confidence,
        bounds=_bounds(federation, view, before, confidence),
        separations=separations_of(federation, view),
        flaws=tuple(filter(None, flaws_of(federation, view))),
        unmeasured=unmeasured(federation),
        membership=None if federation.personal else _membership(federation),
    )


def check_audit(config: RunConfig, canaries: int, confidence: float) -> None:
    """Refuse what cannot be audited.

    Raises:
        ConfigError: no privacy, clients that ship nothing, or numbers out of range.
    """
    rule = check(config)
    if config.privacy.mode == "none":
        raise ConfigError("privacy.mode = 'none': an audit needs a claim, 'example' or 'client'")
    if not rule.facts.uploaded and config.model.head != "train":
        raise ConfigError(f"strategy.name = {config.strategy.name!r}: clients send nothing, so nothing leaks")
    if config.privacy.private and config.privacy.clipping == "adaptive":
        raise ConfigError(
            "privacy.clipping = 'adaptive': what a canary is clipped to follows the noise, so that an audit "
            "cannot say how far it should go; audit with 'flat'"
        )
    if canaries < 8:
        raise ConfigError(f"--canaries {canaries}: must be >= 8")
    if not 0 < confidence < 1:
        raise ConfigError(f"--confidence {confidence:g}: must be in (0, 1)")


def _client_level(
    config: RunConfig, canaries: int, confidence: float, progress: Callable[[dict[str, Any]], None] | None
) -> Audit:
    with tempfile.TemporaryDirectory(prefix="fedlora-audit-") as directory:
        home = Path(directory)
        session = InProcessSession(InProcessEngine(), audited(config), home / "clients")
        federation = FederatedRun(session, RunDirectory(home / "run"), [Tell(progress)] if progress else [])
        mechanism, clients = federation.strategy.client_dp, sorted(federation.partitions)
        assert isinstance(mechanism, ClientDP)
        if config.secure.noise != "none":
            mechanism = shared_sums(config, mechanism)
        last = config.num_server_rounds
        rounds = most_participations(last, mechanism.bands, config.privacy.max_participations)
        most = sum(_dimensions(federation).values())
        hidden = WithCanaries(mechanism, min(canaries, most), rounds, config.seed)
        federation.strategy.client_dp = cast(ClientDP, hidden)
        result = federation.run(AuditGrid(session.runtime, session.config, clients, home / "clients"))
    noise, delta = hidden.claimed, config.privacy.target_delta
    expected = Expected(steps=hidden.power, sample_rate=1.0, noise_multiplier=noise)
    alarm, scores = FALSE_ALARM / 3, hidden.scores / expected.noise
    by_round = [noise_of_round.numpy() for noise_of_round in hidden.noise]
    flaws = (flaw_of_noise(hidden.noise, noise, alarm), flaw_of_pairs(by_round, alarm))
    return Audit(
        strategy=config.strategy.name,
        optimizer=config.train.optimizer,
        clients=len(clients),
        draws=float(rounds),
        claimed_epsilon=float(result["epsilon"]),
        target_delta=delta,
        confidence=confidence,
        bounds={PUBLISHED: {CLIENTS: bound_of(scores, hidden.coins, delta, confidence)}},
        separations={CLIENTS: separation(scores, hidden.coins, expected.separation, delta, alarm)},
        flaws=tuple(f"the published means' noise {flaw}" for flaw in flaws if flaw),
        unmeasured="at client level every published mean was",
        membership=_membership(federation),
    )


def audited(config: RunConfig) -> RunConfig:
    """The same run without what an audit does not look at, on a ledger that is thrown away."""
    return replace(
        config,
        output_dir="",
        **by_field(config.measured_once),
        strategy=replace(config.strategy, diagnostics=False),
        privacy=replace(config.privacy, ledger="", dataset_id=""),
        secure=replace(config.secure, mode="none", noise="none"),  # masks hide what an attack looks at
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
    return {
        p: federation.config.local_steps_of(p) * claimed_rate(federation, p) for p in federation.partitions
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
