"""Federated LoRA strategies for Flower, one rule for each paper.

>>> from strategies import FLoRA
>>> FLoRA(fraction_train=0.5, scaling=2.0).rule.facts.exact
True
"""

from strategies.named import NAMED
from strategies.registry import RULES, make_rule

globals().update(NAMED)
__all__ = [*NAMED, "RULES", "make_rule"]
