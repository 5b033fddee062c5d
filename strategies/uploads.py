"""Upload codec of a run, and whether it suits the rule.

Error feedback tells in a later round what this one left out.
"""

from __future__ import annotations

from fedlora import wire
from fedlora.errors import NotApplicable
from strategies.registry import RULES
from strategies.rule import Rule


def codec_of(upload: str, rule: Rule, wire_dtype: str) -> str:
    """The codec's name: what the run asks for, else the rule's own, else the floats that travel down.

    >>> codec_of("", RULES["lora-a2"](), "float16"), codec_of("int8", RULES["lora-a2"](), "float16")
    ('changed', 'int8')
    """
    return upload or rule.upload or wire_dtype


def checked_upload(upload: str, rule: Rule, *, client_dp: bool) -> str:
    """The codec's name, after refusing one that the rule cannot take.

    A codec without error feedback suits every rule. With it the numbers that are told late must still mean
    what they meant, and count wherever they are told: a mean of what is shipped, in coordinates that stay. A
    robust centre would take what is told late, and zero elsewhere, for what lies apart. That a client's
    updates depend on each other through what it owes is not in the argument for client-level privacy here.

    Args:
        upload: the codec's name.
        rule: of the run.
        client_dp: whole clients are hidden.

    Raises:
        ConfigError: there is no such codec.
        NotApplicable: the rule, its allocation or centre, or client-level privacy excludes it.
    """
    if not wire.codec_named(upload).feedback:
        return upload
    key = f"upload = {upload!r}"
    if not rule.coordinates_stay:
        names = ", ".join(name for name, kind in RULES.items() if kind().coordinates_stay)
        raise NotApplicable(
            f"{key}: tells later what it leaves out now, which {rule.facts.name} would read in other "
            f"coordinates or not as a mean (able: {names})"
        )
    if rule.allocation.parts:
        raise NotApplicable(
            f"{key}: tells later what it leaves out now, and under strategy.allocation = "
            f"{rule.allocation.name!r} other directions train then"
        )
    if not rule.center.is_mean:
        raise NotApplicable(
            f"{key}: strategy.robust = {rule.center.name!r} would cut off what is told late, must be 'none'"
        )
    if client_dp:
        raise NotApplicable(
            f"{key}: privacy.mode = 'client' covers no updates that depend on each other through what is "
            "owed, accepted are codecs without error feedback"
        )
    return upload
