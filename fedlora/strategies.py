"""Strategies by the name that they have in an installed wheel; in a checkout they lie in ``strategies/``.

>>> from fedlora.strategies import FLoRA
>>> FLoRA(fraction_train=0.5, scaling=2.0).rule.facts.exact
True
"""

from strategies import *  # noqa: F403
from strategies import __all__ as __all__
