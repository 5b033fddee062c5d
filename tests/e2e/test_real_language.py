"""SmolLM2 and the novels as they are in the user's cache; skipped where they are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora.assets.models import converted_home
from fedlora.config import ModelConfig
from fedlora.data.builtin.novels import is_cached, novels_table
from fedlora.data.chat.conversations import Turn
from fedlora.data.tokenizers import load_tokenizer
from fedlora.models import build_model

pytestmark = [pytest.mark.slow, pytest.mark.real]


@pytest.fixture(scope="module", autouse=True)
def assets() -> Iterator[None]:
    """The user's own cache, with both in it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("FEDLORA_CACHE", raising=False)
        if not (is_cached() and converted_home().is_dir()):
            pytest.skip(
                "not in the cache: fedlora run experiments/novels.toml fetches SmolLM2 and the novels"
            )
        yield


def test_six_novels() -> None:
    table = novels_table()
    texts = dict(zip(table["domain"][:], table["text"][:], strict=True))
    assert len(texts) == 6
    assert texts["emma"].startswith("EMMA\n\nBy Jane Austen")
    assert all(400_000 < len(text) < 900_000 for text in texts.values())


def test_the_converted_model_knows_english() -> None:
    tokenizer = load_tokenizer("smollm2")
    ids = torch.tensor([tokenizer.pieces(["The capital of France is the city of"])[0]])
    built = build_model(ModelConfig(name="smollm2"), 0, 0, "language-model")
    with torch.no_grad():
        logits = built(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(converted_home(), dtype=torch.float32)(input_ids=ids)
    assert torch.equal(logits, plain.logits)
    assert tokenizer.decode([int(logits[0, -1].argmax())]).strip() == "Paris"


def test_its_chat_template_marks_the_answer() -> None:
    tokenizer = load_tokenizer("smollm2")
    ids, counted = tokenizer.chat([Turn("user", "Two and two?"), Turn("assistant", "Four.")])
    answer = [i for i, counts in zip(ids, counted, strict=True) if counts]
    assert tokenizer.decode(answer).strip() == "Four."
    assert tokenizer.end_token_id in answer
