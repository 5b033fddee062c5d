"""Federated LoRA strategies for Flower, one rule for each paper.

>>> from strategies import FLoRA
>>> FLoRA(fraction_train=0.5, scaling=2.0).rule.facts.exact
True
"""

from strategies.public import FedAvg, FedSVD, FedSVDRenew, FFALoRA, FLoRA, HeadOnly, LoRAFAIR
from strategies.registry import RULES, make_rule

__all__ = [
    "RULES",
    "FFALoRA",
    "FLoRA",
    "FedAvg",
    "FedSVD",
    "FedSVDRenew",
    "HeadOnly",
    "LoRAFAIR",
    "make_rule",
]
