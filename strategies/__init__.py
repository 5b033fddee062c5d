"""Federated LoRA strategies for Flower, one rule for each paper.

>>> from strategies import FLoRA
>>> FLoRA(fraction_train=0.5, scaling=2.0).rule.facts.exact
True
"""

from strategies.named import (
    FedAvg,
    FedExLoRA,
    FedMomentum,
    FedRotLoRA,
    FedSALoRA,
    FedSB,
    FedSVD,
    FedSVDRenew,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    FLoRIST,
    HeadOnly,
    HetLoRA,
    LoRAFAIR,
    RoLoRA,
    ZeroPadding,
)
from strategies.registry import RULES, make_rule

__all__ = [
    "RULES",
    "FFALoRA",
    "FLoRA",
    "FLoRIST",
    "FedAvg",
    "FedExLoRA",
    "FedMomentum",
    "FedRotLoRA",
    "FedSALoRA",
    "FedSB",
    "FedSVD",
    "FedSVDRenew",
    "FlexLoRA",
    "HeadOnly",
    "HetLoRA",
    "LoRAFAIR",
    "RoLoRA",
    "ZeroPadding",
    "make_rule",
]
