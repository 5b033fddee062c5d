"""What excludes secure sums, and the largest weight in them, settled before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Collection

from clients.privacy import mechanism_of
from clients.secure_steps import terms_of
from fedlora.config import RunConfig
from fedlora.errors import ConfigError, NotApplicable
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.graph import colluders_held
from fedlora.secure.noise import SharedNoise
from strategies.registry import RULES
from strategies.replies import KnownExamples
from strategies.rule import Rule
from strategies.sampling import clients_of_round
from strategies.sums import told_by_sums

KEY = "secure.mode = 'sums'"


def check_secure(config: RunConfig, rule: Rule) -> None:
    """Refuse what a server needs single updates for.

    Raises:
        NotApplicable: a rule that does more than add, or bounds, noise and codecs of single updates.
        ConfigError: clients of unlike shapes or scalings, or weights without a bound that is known.
    """
    if not rule.facts.secure_sum:
        able = ", ".join(name for name, r in RULES.items() if r.facts.secure_sum)
        raise NotApplicable(
            f"{KEY}: {rule.facts.name} needs each client's own factors, or shows them (able: {able})"
        )
    if rule.facts.sketched and rule.allocation.parts:
        raise NotApplicable(
            f"{KEY}: {rule.facts.name} adds up sketches of whole layers, strategy.allocation = "
            f"{rule.allocation.name!r} lets directions of them rest"
        )
    single = {
        "strategy.robust": (config.strategy.robust, "none"),
        "strategy.max-update-norm": (config.strategy.max_update_norm, 0.0),
        "devices.buffer-size": (config.devices.buffer_size, 0),
        "devices.tiers": (config.devices.tiers, 0),
    }
    for key, (value, none) in single.items():
        if value != none:
            raise NotApplicable(f"{KEY}: {key} = {value!r} looks at single updates, must be {none!r}")
    if config.strategy.screening == "on":
        raise NotApplicable(
            f"{KEY}: strategy.screening = 'on' compares single updates, accepted are auto, off"
        )
    if config.privacy.mode == "client" and config.secure.noise == "none":
        raise NotApplicable(
            f"{KEY}: privacy.mode = 'client' clips single updates at the server, unless secure.noise is "
            "'distributed'"
        )
    if config.upload not in ("", "float32"):
        raise NotApplicable(
            f"{KEY}: upload = {config.upload!r}: masked updates travel as integers, leave it out"
        )
    if config.secure.sketch_size and not rule.facts.sketched:
        raise NotApplicable(
            f"secure.sketch-size = {config.secure.sketch_size}: {rule.facts.name} adds up no products"
        )
    unlike = any(g.rank is not None or g.alpha is not None or g.target_modules for g in config.groups)
    if (unlike or len(set(config.lora.rank_list)) > 1) and not rule.facts.sketched:
        raise NotApplicable(f"{KEY}: clients of their own rank, alpha or target-modules cannot be added up")


def secure_line(config: RunConfig, rule: Rule) -> str:
    """What is summed and what is off for it, in a sentence."""
    secure, noise = config.secure, ""
    if secure.noise != "none":
        noise = f"; each clips and noises its own update, noise of {secure.honest} is counted on"
    told = told_by_sums(rule) and secure.noise == "none" and config.strategy.diagnostics
    off = "screening and clients' cosine" if told else "screening and diagnostics"
    what = "sums of sketched products" if rule.facts.sketched else "sums"
    return (
        f"the server learns {what} of at least {secure.min_clients} clients, modulo 2^{secure.bits}{noise}; "
        f"{off}, which look at single updates, are off"
    )


def shared_noise(config: RunConfig, clients: int) -> Callable[[int], SharedNoise] | None:
    """How so many clients, or fewer, write changes with noise; None where they add none.

    Raises:
        ConfigError: a grid too fine for so many, a round that asks too few for its noise, or colluders who
            could take off masks.
    """
    shared, secure = mechanism_of(config).shared_noise, config.secure
    if shared is None:
        return None
    share, least = config.fraction_train * config.devices.over_selection, secure.min_clients
    asked = min(clients, clients_of_round(share, clients, config.min_train_nodes))
    if asked < least:
        raise ConfigError(
            f"secure.min-clients = {least}: a round asks {asked} clients, whose noise is too little"
        )
    most = colluders_held(least, asked, secure.threshold)
    if secure.colluding > most:
        raise ConfigError(
            f"secure.colluding = {secure.colluding}: the masks of {least} clients (secure.min-clients) hold "
            f"against at most {most} who collude"
        )
    shared(asked)
    return shared


def largest_weight(config: RunConfig, partitions: Collection[int], known_examples: KnownExamples) -> int:
    """The most that a client may weigh in a run's sums.

    Raises:
        ConfigError: it is not known, fewer clients take part than a sum may be of, or sums could overflow.
    """
    least = terms_of(config).min_clients
    if len(partitions) < least:
        raise ConfigError(f"secure.min-clients = {least}: only {len(partitions)} clients take part")
    asked = clients_of_round(config.fraction_train, len(partitions), config.min_train_nodes)
    if asked < least:
        raise ConfigError(
            f"fraction-train = {config.fraction_train:g}: a round asks {asked} of {len(partitions)} clients, "
            f"secure.min-clients = {least}"
        )
    most = 1
    if mechanism_of(config).weighted_by_key is not None:
        known = [known_examples(partition) for partition in partitions]
        if not config.secure.max_weight and None in known:
            raise ConfigError(
                "secure.max-weight = 0: how many examples each client has is not known here, say the most"
            )
        most = config.secure.max_weight or max(number or 0 for number in known)
    FixedPoint(len(partitions), config.secure.bits, config.secure.largest_change, most)
    return most
