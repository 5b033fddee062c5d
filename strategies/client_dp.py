"""Client-level differential privacy: which client took part, and with what data, is hidden in the model.

McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018
(arXiv 1710.06963), the fixed-denominator estimator; with dX_k what client k's shipped tensors changed:

    X' = X + ( sum_k clip(dX_k, S) + N(0, z^2 S^2) ) / m

Clipping is of all shipped tensors and the head together, to norm S. m is the *planned* cohort: a client that
does not answer is a zero update, so the denominator depends on nobody's data. Everybody weighs alike.

It is central: the server sees every update before the noise, and must be trusted; what is protected is the
model that others receive. Neighbouring runs differ by one client sending nothing (zero-out). Each round
in which a client takes part costs one Gaussian mechanism of noise z; the sampling amplifies nothing here,
because cohorts have a fixed size and clients know when they took part.

With more than one coefficient c_0 .. c_{b-1} the noise is correlated over rounds at the same price, as long
as a client takes part at most once in b rounds (`fedlora.privacy.banded`; `strategies.sampling` sees to it):
round t adds z S y_t in place of z S z_t, where C y = z, row by row

    y_t = ( z_t - sum_{j=1..b-1} c_j y_{t-j} ) / c_0

so that b - 1 rows of noise are remembered between rounds, as secret as the updates. In the model, where
rounds add up, most of it cancels, also with a server's momentum, for which c is made.

Only for rules whose aggregate is a mean of what is shipped, under equal ranks and scalings: a stack shows
each client's factors, and no noise on a sum covers them. What a rule makes of the noisy mean (an SVD, a
server optimiser) is post-processing and free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedlora.core.adapters import LayerAdapter
from fedlora.core.factors import Tensors
from fedlora.core.seeding import torch_stream
from fedlora.core.state import Broadcast, ClientUpdate
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.privacy.entropy import on_grid, system_normal
from strategies.mean import MeanRule
from strategies.rule import Rule
from strategies.server_optimizer import LINEAR


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDP:
    """The mechanism.

    Attributes:
        clipping_norm: S, > 0.
        noise_multiplier: z, noise standard deviation of the sum over S.
        seed: of the noise in simulation; None draws it from the operating system.
        coefficients: c, of `fedlora.privacy.banded.square_root`; one of them is independent noise.
        rows: tensor -> round -> y of the last b - 1 rounds.

    Raises:
        ConfigError: a number out of range, or coefficients whose length is not 1.
    """

    clipping_norm: float
    noise_multiplier: float
    seed: int | None
    coefficients: tuple[float, ...] = (1.0,)
    rows: dict[str, dict[int, Tensor]] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for key in ("clipping_norm", "noise_multiplier"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"privacy.{key.replace('_', '-')} = {value}: must be > 0")
        length = math.hypot(*self.coefficients)
        if not (abs(length - 1) < 1e-9 and self.coefficients[0] > 0):
            raise ConfigError(f"coefficients: their length is {length:g}, must be 1, and the first one > 0")

    @property
    def seeded(self) -> bool:
        """Whether a round that is done again has the same noise."""
        return self.seed is not None

    @property
    def bands(self) -> int:
        """Rounds b in which a client may take part once."""
        return len(self.coefficients)

    def check(self, rule: Rule) -> None:
        """Refuse what noise on a mean does not cover, and where correlated noise would not cancel.

        Raises:
            ConfigError: the aggregate is no mean.
            NotApplicable: a robust centre, or rounds do not add up.
        """
        if not rule.facts.client_dp:
            raise ConfigError(f"client_dp: the aggregate of {rule.facts.name} is no mean of what is shipped")
        if not rule.center.is_mean:
            raise NotApplicable(f"client_dp: the centre {rule.center.name!r} is no mean, must be 'mean'")
        if self.bands > 1 and (why := never_cancels(rule)):
            raise NotApplicable(f"client_dp: {self.bands} coefficients, but {why}")

    def memory(self) -> Tensors:
        """Noise that later rounds take back, by ``<round>/<tensor>``; empty where it is independent."""
        return {f"{number}/{name}": row for name, own in self.rows.items() for number, row in own.items()}

    def remember(self, memory: Tensors, done: int) -> None:
        """Go on from a `memory` after so many rounds.

        Raises:
            ConfigError: noise of the last round is missing.
        """
        self.rows.clear()
        for key, row in memory.items():
            number, _, name = key.partition("/")
            self.rows.setdefault(name, {})[int(number)] = row
        last = min((max(own) for own in self.rows.values()), default=0)
        if self.bands > 1 and last < done:
            raise ConfigError(f"privacy.noise-bands = {self.bands}: the noise of round {done} was not kept")

    @property
    def adapted_norm(self) -> float | None:
        """The next round's clipping norm, where it changes from round to round."""
        return None

    def now(self, planned: int) -> ClientDP:
        """What clips and noises the next round's sum over so many clients."""
        return self

    def privatise(
        self, updates: Sequence[ClientUpdate], sent: Mapping[int, Broadcast], planned: int, server_round: int
    ) -> list[ClientUpdate]:
        """The updates as one, whose values are the private mean; sum and noise are added in float64.

        The noisy sum lies on a grid (`fedlora.privacy.entropy.on_grid`), so that its last bits do not tell
        which terms it has.

        Args:
            updates: what was received, at least one.
            sent: what each of them started from, by partition.
            planned: clients that were asked, m.
            server_round: names the noise in simulation.
        """
        ordered = sorted(updates, key=lambda update: update.partition_id)
        start = sent[ordered[0].partition_id]
        clipped = [self.clipped(changes(update, sent[update.partition_id])) for update in ordered]
        sums = {name: sum((c[name] for c in clipped[1:]), start=clipped[0][name]) for name in clipped[0]}
        adapters, head = moved(
            start, {name: self._noisy(total, name, server_round) / planned for name, total in sums.items()}
        )
        return [replace(ordered[0], adapters=adapters, head=head, weight=1.0)]

    def clipped(self, changed: dict[str, Tensor]) -> dict[str, Tensor]:
        """A change that is at most the clipping norm long."""
        norm = math.sqrt(sum(float(t.square().sum()) for t in changed.values()))
        factor = min(1.0, self.clipping_norm / norm) if norm > 0 else 1.0
        return {name: factor * t for name, t in changed.items()}

    def _noisy(self, total: Tensor, name: str, server_round: int) -> Tensor:
        std = self.noise_multiplier * self.clipping_norm
        return on_grid(total + std * self._row(name, total.shape, server_round), std)

    def _row(self, name: str, shape: torch.Size, server_round: int) -> Tensor:
        """Y of the round; of rounds before in which nothing was published it is drawn, too.

        Raises:
            RunFailed: the round's noise was drawn before: another sum with it would show the difference.
        """
        if self.bands == 1:
            return self._drawn(name, shape, server_round)
        own, (first, *others) = self.rows.setdefault(name, {}), self.coefficients
        if server_round <= max(own, default=0):
            raise RunFailed(f"round {server_round}: its noise is drawn, and serves once")
        for number in range(max(own, default=0) + 1, server_round + 1):
            row = self._drawn(name, shape, number)
            for lag, c in enumerate(others, start=1):
                if number - lag in own:
                    row = row - c * own[number - lag]
            own[number] = row / first
            own.pop(number - self.bands + 1, None)
        return own[server_round]

    def _drawn(self, name: str, shape: torch.Size, server_round: int) -> Tensor:
        if self.seed is None:
            return system_normal(shape)
        generator = torch_stream(self.seed, "client-dp", server_round, name)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def never_cancels(rule: Rule) -> str:
    """Why noise of one round would not be taken back by that of another; empty where it is."""
    name, (first, *later) = rule.facts.name, [rule.shipped(number) for number in (1, 2, 3)]
    if rule.facts.rotates_basis:
        return f"{name} writes the model in another basis after each round, so that noise does not cancel"
    if any(shipped != first for shipped in later):
        return f"{name} ships other tensors by turns, so that noise does not cancel"
    if rule.allocation.name != "all":
        return f"strategy.allocation = {rule.allocation.name!r}: what rests takes back no noise"
    if isinstance(rule, MeanRule) and rule.optimizer.by_coordinate:
        return (
            f"strategy.server-optimizer = {rule.optimizer.name!r} divides by the noise, must be "
            f"{' or '.join(LINEAR)}"
        )
    return ""


def changes(update: ClientUpdate, start: Broadcast) -> dict[str, Tensor]:
    """Updates minus starts in float64, by unique names; zero where nothing is trained."""
    changed = {
        f"{name} {module}": update.adapters[module].tensors()[name].double() - sent.tensors()[name].double()
        for module, sent in start.adapters.items()
        for name in sorted(start.uploaded & sent.tensors().keys())
    }
    return changed | {
        f"head {name}": update.head[name].double() - start.head[name].double() for name in sorted(start.head)
    }


def moved(
    start: Broadcast, changed: Mapping[str, Tensor]
) -> tuple[dict[str, LayerAdapter], dict[str, Tensor]]:
    """Starts plus float64 changes, in the type of the starts."""

    def of(name: str, tensor: Tensor) -> Tensor:
        return (tensor.double() + changed[name]).to(tensor.dtype) if name in changed else tensor

    adapters = {
        module: sent.replaced({name: of(f"{name} {module}", t) for name, t in sent.tensors().items()})
        for module, sent in start.adapters.items()
    }
    return adapters, {name: of(f"head {name}", t) for name, t in start.head.items()}
