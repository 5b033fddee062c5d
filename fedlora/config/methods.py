"""Other methods than LoRA: which are not to be had, and why (docs/peft.md)."""

from __future__ import annotations

MISS = (
    "its update is linear in one matrix, which is LoRA with a fixed A: strategy.init-a = 'miss' with "
    "strategy.name = 'ffa'"
)
NOT_HERE = {
    "dora": (
        "its weight m (W + s B A) / ||W + s B A|| is not linear in what clients would send, so that no mean "
        "of it is the mean of their weights"
    ),
    "miss": MISS,
    "bone": MISS,
    "randlora": (
        "its update is a product of two trained sets of diagonals between random bases, which no strategy "
        "here averages exactly (strategy.name = 'fed-sb' is the nearest that is exact)"
    ),
    "adalora": (
        "each client prunes directions of its own, whose singular values cannot be averaged "
        "(strategy.name = 'hetlora' prunes ranks)"
    ),
    "loftq": (
        "its 4-bit base is made together with A and B, and here the base is the same whatever a run starts "
        "from"
    ),
}
"""By ``lora.method``."""
