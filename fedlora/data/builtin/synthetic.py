"""A small made-up text classification task that needs no download: which mood does a note have?

Every note mixes words of its domain, neutral words, and words of its mood (the label). Domains
prefer different moods, so natural clients are skewed; each writer stays in one domain.
"""

from __future__ import annotations

import numpy as np
from datasets import Dataset

from fedlora.core.seeding import stream

NUM_EXAMPLES = 640
WRITERS_PER_DOMAIN = 10

MOODS = {
    "calm": "gentle quiet restful serene slow mellow still tranquil",
    "cross": "angry bitter furious grumpy harsh loud rude sour",
    "curious": "asking exploring guessing looking nosy odd strange wondering",
    "proud": "boasting brave finest mighty haughty splendid triumphant winning",
}
DOMAINS = {
    "garden": "bean fence hedge leaf moss pond rake root rose seed shed spade",
    "harbour": "anchor boat buoy crab dock fog gull net oar rope sail tide",
    "kitchen": "apron bowl bread cup fork kettle ladle oven pan plate soup stove",
    "workshop": "bench bolt chisel drill glue hammer nail paint plank saw screw vise",
}
NEUTRAL = "after again all and at before by day for from here in it next of on our the then this to with"

# Signal words a note has, so that some notes are harder than others.
FEWEST_SIGNALS, MOST_SIGNALS = 1, 4


def synthetic_table() -> Dataset:
    """640 rows with text, label (a mood), domain and group (the writer); always the same rows."""
    rng = stream(0, "synthetic")
    return Dataset.from_list([_note(rng, number) for number in range(NUM_EXAMPLES)])


def _note(rng: np.random.Generator, number: int) -> dict[str, str]:
    which = number % len(DOMAINS)
    domain, mood = list(DOMAINS)[which], _mood(rng, which)
    words = [
        *rng.choice(MOODS[mood].split(), size=rng.integers(FEWEST_SIGNALS, MOST_SIGNALS + 1)),
        *rng.choice(DOMAINS[domain].split(), size=3),
        *rng.choice(NEUTRAL.split(), size=rng.integers(3, 8)),
    ]
    return {
        "text": " ".join(rng.permutation(words)),
        "label": mood,
        "domain": domain,
        "group": f"{domain} writer {rng.integers(WRITERS_PER_DOMAIN)}",
    }


def _mood(rng: np.random.Generator, domain: int) -> str:
    """A mood; the domain's own is twice as likely as each other one."""
    weights = np.ones(len(MOODS))
    weights[domain % len(MOODS)] = 2
    return str(rng.choice(list(MOODS), p=weights / weights.sum()))
