"""Numbers as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.study.analyse.intervals import Estimate
from fedlora.tasks.metrics import ACCURACY, Metric

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


def shown(score: float | None, metric: Metric = ACCURACY) -> str:
    """A score: a share as a percentage, else four significant digits.

    >>> from fedlora.tasks.metrics import METRICS
    >>> shown(0.8125), shown(0.41237, METRICS["rmse"]), shown(None)
    ('81.2%', '0.4124', '\N{EN DASH}')
    """
    if score is None or metric.share:
        return percent(score)
    return f"{score:.4g}".replace("-", MINUS)


def in_sentence(metric: Metric) -> str:
    """A metric's name within a sentence.

    >>> from fedlora.tasks.metrics import METRICS
    >>> in_sentence(ACCURACY), in_sentence(METRICS["f1_micro"])
    ('accuracy', 'F1 (micro)')
    """
    return metric.name if metric is ACCURACY else metric.title


def interval(estimate: Estimate, metric: Metric = ACCURACY, *, difference: bool = False) -> str:
    """The bounds of a score or of a difference of two, see `signed`; empty where there are none.

    >>> interval(Estimate(value=0.5, low=0.4, high=0.6))
    '40.0 to 60.0%'
    >>> interval(Estimate(value=0.1, low=0, high=0.2), difference=True)
    '0.0 to +20.0'
    >>> from fedlora.tasks.metrics import METRICS
    >>> interval(Estimate(value=2.1, low=1.95, high=2.3), METRICS["rmse"])
    '1.95 to 2.3'
    """
    if estimate.low is None or estimate.high is None:
        return ""
    if difference:
        return f"{signed(estimate.low, metric)} to {signed(estimate.high, metric)}"
    if metric.share:
        return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}%"
    return f"{shown(estimate.low, metric)} to {shown(estimate.high, metric)}"


def signed(difference: float, metric: Metric = ACCURACY) -> str:
    """A difference of scores with its sign: of shares in percentage points, else three significant digits.

    >>> from fedlora.tasks.metrics import METRICS
    >>> signed(0.041), signed(-0.0123, METRICS["rmse"])
    ('+4.1', '\N{MINUS SIGN}0.0123')
    """
    text = f"{100 * difference:+.1f}" if metric.share else f"{difference:+.3g}"
    return text.replace("-", MINUS) if float(text) else "0.0" if metric.share else "0"


def size(difference: float, metric: Metric = ACCURACY) -> str:
    r"""The size of a difference: of shares in percentage points.

    >>> from fedlora.tasks.metrics import METRICS
    >>> size(-0.041), size(0.0123, METRICS["mae"])
    ('4.1\xa0points', '0.0123')
    """
    return f"{abs(100 * difference):.1f}{SPACE}points" if metric.share else f"{abs(difference):.3g}"


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
