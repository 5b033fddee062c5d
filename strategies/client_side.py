"""Requirements of a rule on a PEFT client that is not fedlora's: the sentences that say so in round 1."""

from __future__ import annotations

from strategies.facts import Facts


def needs_base_mod(facts: Facts) -> str:
    """To a client that does not say which base it trained on."""
    what = f"{facts.title} moves the base weights"
    return f"{what}: give the ClientApp mods=[base_mod(...)] from fedlora.clients"


def needs_core(facts: Facts) -> str:
    """To a client that sends no core back."""
    return f"{facts.title} trains a core that PEFT has no place for: its clients need fedlora's ClientApp"


def needs_choice(found: int, most: int) -> str:
    """To a client that sends more directions than are its own to choose."""
    return (
        f"changes {found} directions, of which it was to choose {most}: clients of a rank below the global "
        "one need fedlora's ClientApp"
    )


def needs_own_mod(facts: Facts, tensor: str) -> str:
    """To a client that sends back what it should keep."""
    return (
        f"{facts.title} leaves {tensor} with its client: give the ClientApp "
        "mods=[own_mod(directory)] from fedlora.clients"
    )


def needs_freezing(facts: Facts, tensor: str) -> str:
    """To a client that trained a factor which rests in this round."""
    return (
        f"{tensor} came back changed, but {facts.title} does not train it in this round: call "
        "train_as_ordered(model, message) from fedlora.clients before training"
    )


def needs_precision(facts: Facts, tensor: str, dtype: str) -> str:
    """To a client whose adapter cannot hold a factor that rests as it was sent."""
    way_out = "wire_dtype='float16' to the strategy, or keep" if dtype == "float16" else "keep"
    prefix = "give " if dtype == "float16" else ""
    return (
        f"{tensor} comes back in {dtype}, but {facts.title} leaves it as it is in float32: "
        f"{prefix}{way_out} the adapter in float32 (PEFT's autocast_adapter_dtype=True)"
    )
