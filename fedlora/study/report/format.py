"""Numbers as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.study.analyse.summary import Estimate

SPACE = "\N{NO-BREAK SPACE}"
DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
MINUS = "\N{MINUS SIGN}"


def percent(share: float | None) -> str:
    """A share as a percentage.

    >>> percent(0.8125)
    '81.2%'
    """
    return DASH if share is None else f"{100 * share:.1f}%"


def interval(estimate: Estimate, difference: bool = False) -> str:
    """The bounds of a share in percent, or of a difference in points; empty where there are none.

    >>> interval(Estimate(value=0.5, low=0.4, high=0.6)), interval(Estimate(value=0.1, low=0, high=0.2), True)
    ('40.0 to 60.0%', '0.0 to +20.0')
    """
    if estimate.low is None or estimate.high is None:
        return ""
    if difference:
        return f"{signed(estimate.low)} to {signed(estimate.high)}"
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}%"


def signed(share: float) -> str:
    """A difference of shares in percentage points, with its sign.

    >>> signed(0.041)
    '+4.1'
    """
    text = f"{100 * share:+.1f}"
    return text.replace("-", MINUS) if float(text) else "0.0"


def points(share: float) -> str:
    r"""The size of a difference of shares in percentage points.

    >>> points(-0.041)
    '4.1\xa0points'
    """
    return f"{abs(100 * share):.1f}{SPACE}points"


def megabytes(count: float | None) -> str:
    """Bytes in units of 1,000,000.

    >>> megabytes(12_345_678), megabytes(1_200_000), megabytes(4_000)
    ('12.3', '1.20', '0.004')
    """
    if count is None:
        return DASH
    value = count / 1e6
    if value < 1:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 2 - int(math.log10(value)))}f}"


def significant(value: float | None) -> str:
    """Three significant digits, a power of ten in superscript.

    >>> significant(0.0712), significant(0), significant(1e-5)
    ('0.0712', '0', '10⁻⁵')
    """
    if value is None:
        return DASH
    mantissa, e, exponent = f"{value:.3g}".partition("e")
    if not e:
        return mantissa
    power = power_of_ten(int(exponent))
    return power if mantissa == "1" else f"{mantissa}{TIMES}{power}"


def power_of_ten(exponent: int) -> str:
    """The power in superscript.

    >>> power_of_ten(-3)
    '10⁻³'
    """
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"10{str(exponent).translate(digits)}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours.

    >>> duration(4.21), duration(75), duration(7300)
    ('4.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
