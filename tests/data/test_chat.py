"""Conversations as tokens: the tokenizer's own for the whole text, an answer right behind its prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from fedlora.data.chat.conversations import conversation
from fedlora.data.chat.template import TODAY, ChatSettings
from fedlora.data.chat.tokenise import ChatTokens, sequences
from fedlora.data.tokenizers import PretrainedTokenizer
from fedlora.errors import ConfigError
from tests.data.chat_models import ALTERNATING, KINDS, TEMPLATES, saved

Make = Callable[..., PretrainedTokenizer]
TALK = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Six."},
]
SYSTEM = {"role": "system", "content": "Be kind."}
THOUGHT = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "<think>\nadd them\n</think>\n\nFour."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "<think>\nadd more\n</think>\n\nSix."},
]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Tokenizers by kind and template, each saved once."""
    known: dict[Any, PretrainedTokenizer] = {}

    def made(
        kind: str = "byte-level",
        template: str | None = "chatml",
        chat: ChatSettings | None = None,
        **fields: Any,
    ) -> PretrainedTokenizer:
        key = (kind, template, *sorted(fields.items()))
        if key not in known:
            text = TEMPLATES.get(template, template) if template else None
            path = saved(tmp_path_factory.mktemp("tokenizer"), kind, text, **fields)
            known[key] = PretrainedTokenizer(path, path.name)
        found = PretrainedTokenizer(known[key].directory, "model", chat)
        found.__dict__["_loaded"] = known[key]._loaded
        return found

    return made


def of(tokenizer: PretrainedTokenizer, messages: Any, tools: Any = None) -> list[ChatTokens]:
    return sequences(conversation(messages, tools, "row 7"), tokenizer, "row 7")


def learned(tokenizer: PretrainedTokenizer, tokens: ChatTokens) -> list[str]:
    """The texts of the runs of counted tokens, specials included."""
    runs = itertools.groupby(zip(tokens.ids, tokens.counted, strict=True), key=lambda pair: pair[1])
    return [tokenizer._loaded.decode([i for i, _ in run]) for counted, run in runs if counted]


def own_ids(tokenizer: PretrainedTokenizer, messages: Any, **options: Any) -> list[int]:
    ids: list[int] = tokenizer._loaded.apply_chat_template(messages, **options)["input_ids"]
    return ids


WORD = st.text(st.sampled_from("ab é漢🦊?'"), min_size=1, max_size=6).map(lambda text: f"x{text}x")


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    kind=st.sampled_from(sorted(KINDS)),
    words=st.lists(WORD, min_size=2, max_size=6).filter(lambda words: len(words) % 2 == 0),
    system=st.booleans(),
    thinks=st.booleans(),
)
def test_each_answer_follows_the_tokens_of_its_generation_prompt(
    make: Make, name: str, kind: str, words: list[str], system: bool, thinks: bool
) -> None:
    tokenizer = make(kind, name)
    thinks = (thinks and name in ("qwen-thinking", "deepseek")) or name == "deepseek"
    said = [
        {"role": "assistant", "content": f"<think>\nhm {word}\n</think>\n\n{word}" if thinks else word}
        if place % 2
        else {"role": "user", "content": word}
        for place, word in enumerate(words)
    ]
    start = [SYSTEM] if system and name not in ALTERNATING else []
    messages = [*start, *said]
    found = of(tokenizer, messages)
    assert len(found) == (len(words) // 2 if thinks else 1)
    spots = [len(start) + place for place in range(1, len(said), 2)]
    for number, spot in enumerate(spots):
        prompt = own_ids(tokenizer, messages[:spot], add_generation_prompt=True)
        tokens = found[number if thinks else 0]
        assert tokens.ids[: len(prompt)] == prompt
        assert not tokens.counted[len(prompt) - 1]
        assert tokens.counted[len(prompt)]
    for number, tokens in enumerate(found):
        spoken = learned(tokenizer, tokens)
        wanted = [words[2 * number + 1]] if thinks else words[1::2]
        assert len(spoken) == len(wanted)
        for text, word in zip(spoken, wanted, strict=True):
            assert word in text
            assert tokenizer._loaded(text, add_special_tokens=False)["input_ids"][-1] in tokenizer.marks
    if not thinks:
        assert found[0].ids == own_ids(tokenizer, messages)


@pytest.mark.parametrize("name", ["chatml", "llama"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_mask_is_that_of_generation_markers(make: Make, kind: str, name: str) -> None:
    tokenizer = make(kind, name)
    (tokens,) = of(tokenizer, TALK)
    own = tokenizer._loaded.apply_chat_template(TALK, return_assistant_tokens_mask=True, return_dict=True)
    assert tokens.ids == own["input_ids"]
    assert [int(counts) for counts in tokens.counted] == own["assistant_masks"]


def test_blanks_that_an_end_mark_swallows_are_not_learned(make: Make) -> None:
    tokenizer = make(stripping=True)
    (tokens,) = of(tokenizer, TALK)
    assert tokens.ids == own_ids(tokenizer, TALK)
    assert [text.strip() for text in learned(tokenizer, tokens)] == ["Four.<|im_end|>", "Six.<|im_end|>"]


def test_a_tokenizer_that_puts_a_blank_first_does_so_once(make: Make) -> None:
    tokenizer = make("blank-before", "mistral")
    (tokens,) = of(tokenizer, TALK)
    assert learned(tokenizer, tokens) == ["Four.</s>", "Six.</s>"]
    plain = make("blank-before", None)
    (tokens,) = of(plain, TALK)
    text = "User: Two and two?\nAssistant: Four.</s>User: And two?\nAssistant: Six.</s>"
    assert tokens.ids == plain._loaded(text, add_special_tokens=False)["input_ids"]


def test_a_prompt_that_shares_a_token_with_its_answer_is_said_so(make: Make) -> None:
    blank = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '-> ' }}"
        "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    tokenizer = make("blank-before", blank)
    (tokens,) = of(tokenizer, [{"role": "user", "content": "sky"}, {"role": "assistant", "content": "is"}])
    assert tokens.merged
    assert tokens.ids == tokenizer._loaded("sky-> is</s>", add_special_tokens=False)["input_ids"]
    assert [t.strip() for t in learned(tokenizer, tokens)] == ["is</s>"]


# --- templates of reasoning models -----------------------------------------------------------------------


def test_dropped_thoughts_make_one_sequence_of_each_answer(make: Make) -> None:
    tokenizer = make(template="qwen-thinking")
    first, second = of(tokenizer, THOUGHT)
    assert learned(tokenizer, first) == ["<think>\nadd them\n</think>\n\nFour.<|im_end|>"]
    assert learned(tokenizer, second) == ["<think>\nadd more\n</think>\n\nSix.<|im_end|>"]
    assert second.ids == own_ids(tokenizer, THOUGHT)
    assert "add them" not in tokenizer._loaded.decode(second.ids)


def test_the_last_answer_alone(make: Make) -> None:
    for template, talk in (("qwen-thinking", THOUGHT), ("chatml", TALK)):
        tokenizer = make(template=template, chat=ChatSettings(assistant_loss="last"))
        (tokens,) = of(tokenizer, talk)
        assert tokens.ids == own_ids(tokenizer, talk)
        assert [text.endswith("Six.<|im_end|>") for text in learned(tokenizer, tokens)] == [True]


def test_a_thought_that_the_prompt_opens_is_gone_on_with(make: Make) -> None:
    tokenizer = make(template="deepseek")
    for content in ("<think>\nadd\n</think>\n\nFour.", "add\n</think>\n\nFour."):
        talk = [TALK[0], {"role": "assistant", "content": content}]
        (tokens,) = of(tokenizer, talk)
        assert (
            tokenizer._loaded.decode(tokens.ids)
            == "<s><|U|>Two and two?<|A|><think>\nadd\n</think>\n\nFour.</s>"
        )
        assert learned(tokenizer, tokens) == ["add\n</think>\n\nFour.</s>"]


def test_an_answer_without_the_thought_that_its_prompt_opens_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"row 7, message 2: .*'<think>\\n'.*model\.chat-template"):
        of(make(template="deepseek"), TALK)


def test_variables_of_the_template(make: Make) -> None:
    tokenizer = make(template="qwen-thinking", chat=ChatSettings(kwargs={"enable_thinking": False}))
    with pytest.raises(ConfigError, match="begins without '<think>"):
        of(tokenizer, TALK)
    empty = {"role": "assistant", "content": "<think>\n\n</think>\n\nFour."}
    (tokens,) = of(tokenizer, [TALK[0], empty])
    assert learned(tokenizer, tokens) == ["Four.<|im_end|>"]


def test_a_template_of_ones_own(make: Make) -> None:
    own = (
        "{% for m in messages %}{{ m.role[0] + '|' + m.content + eos_token }}{% endfor %}"
        "{{ 'a|' if add_generation_prompt }}"
    )
    tokenizer = make(chat=ChatSettings(template=own))
    assert tokenizer.identity != make().identity
    (tokens,) = of(tokenizer, TALK)
    assert tokenizer._loaded.decode(tokens.ids) == "u|Two and two?</s>a|Four.</s>u|And two?</s>a|Six.</s>"
    assert learned(tokenizer, tokens) == ["Four.</s>", "Six.</s>"]


def test_the_date_is_the_same_every_day(make: Make) -> None:
    dated = "\n  {% set day = strftime_now('%d %B %Y') %}It is {{ day }}.\n" + TEMPLATES["chatml"]
    tokenizer = make(template=dated)
    (tokens,) = of(tokenizer, TALK)
    text = tokenizer._loaded.decode(tokens.ids)
    today = (
        tokenizer._loaded.apply_chat_template(TALK, tokenize=False).partition("It is")[2].partition(".")[0]
    )
    assert text == tokenizer._loaded.apply_chat_template(TALK, tokenize=False).replace(
        today, f" {TODAY:%d %B %Y}"
    )


# --- what a template does not write --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "messages", "says"),
    [
        ("mistral", [SYSTEM, *TALK], r"row 7: the chat template refuses it \(only user"),
        ("mistral", [TALK[0], *TALK], "roles must alternate"),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content + '</s>' }}{% endfor %}",
            [SYSTEM, *TALK],
            "row 7, message 1: the chat template leaves it out, a message of role 'system'",
        ),
        (
            "chatml",
            [TALK[0], {**TALK[1], "tool_calls": [{"name": "add", "arguments": "{}"}]}],
            "message 2: .* lacks the call of 'add'",
        ),
        (
            "chatml",
            [TALK[0], {**TALK[1], "reasoning_content": "hm"}],
            "lacks its reasoning_content",
        ),
    ],
)  # fmt: skip
def test_what_a_template_cannot_carry_is_refused(make: Make, name: str, messages: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        of(make(template=name), messages)


def test_tools_that_a_template_leaves_out_are_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="leaves out its tools"):
        of(make(), TALK, [{"type": "function", "function": {"name": "add"}}])


def test_a_tool_call_is_learned(make: Make) -> None:
    calling = (
        "{% if tools %}{{ tools | tojson + '</s>' }}{% endif %}{% for m in messages %}{{ m.role + ':' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}{% endfor %}"
        "{{ m.content or '' }}{{ '</s>' }}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": '{"of": [2, null]}'}}
    talk = [
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
    ]
    tokenizer = make(template=calling)
    (tokens,) = of(tokenizer, [*talk, {"role": "assistant", "content": "Four."}], '[{"name": "add"}]')
    assert learned(tokenizer, tokens) == ['add{"of": [2, null]}</s>', "Four.</s>"]


def test_an_answer_to_nothing_and_one_of_weight_0_are_context(make: Make) -> None:
    tokenizer = make()
    hello = {"role": "assistant", "content": "Hello."}
    (tokens,) = of(tokenizer, [hello, TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]])
    assert learned(tokenizer, tokens) == ["Six.<|im_end|>"]


# --- the first token ------------------------------------------------------------------------------------


def beginning(tokenizer: PretrainedTokenizer) -> PretrainedTokenizer:
    """The tokenizer with a first token of its own, as Llama's has."""
    loaded = tokenizer._loaded
    bos = loaded.bos_token_id
    loaded.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return tokenizer


def test_the_first_token_stands_where_the_tokenizer_puts_it_and_never_twice(make: Make) -> None:
    tokenizer = beginning(make("byte-level", "llama", pad_token="<unk>"))
    bos, loaded = tokenizer._loaded.bos_token_id, tokenizer._loaded
    assert tokenizer.documents(["sky", "<s>sky"]) == [[*loaded("sky")["input_ids"], loaded.eos_token_id]] * 2
    (tokens,) = of(tokenizer, TALK)
    assert tokens.ids.count(bos) == 1
    plain = beginning(make("byte-level", None, pad_token="<unk>"))
    (tokens,) = of(plain, TALK)
    assert tokens.ids[0] == bos
    assert tokens.ids.count(bos) == 1
    assert tokens.counted[0] is False


def test_without_template_and_end_token_the_way_out_is_named(make: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"neither a chat template nor an end token, set model\.chat-template"
    ):
        of(make("byte-level", None, eos_token=None), TALK)


def test_a_slow_tokenizer_marks_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    (tokens,) = of(tokenizer, TALK)
    monkeypatch.setattr(type(tokenizer), "spans", lambda self, text: None)
    assert of(tokenizer, TALK) == [tokens]
