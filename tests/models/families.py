"""Tiny random models with tokenizers, one of each family of architectures that people fine-tune.

Width 16, one layer, words w0 to w59. `save` writes a directory that transformers and fedlora read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
PAD, CLS, SEP = 0, 1, 2
WORDS = 60
VOCABULARY = len(SPECIALS) + WORDS
POSITIONS = 40
LABELS = 3  # a BART of two cannot be saved

_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": CLS, "eos_token_id": SEP}
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": POSITIONS,
}  # fmt: skip
_DECODER: dict[str, Any] = {**_ENCODER, **_IDS, "num_key_value_heads": 1, "head_dim": 8}

ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertConfig(**_ENCODER),
    "albert": lambda: tf.AlbertConfig(**{**_ENCODER, "num_hidden_layers": 2}, embedding_size=8),
    "roberta": lambda: tf.RobertaConfig(**_ENCODER, **_IDS, type_vocab_size=1),
    "modernbert": lambda: tf.ModernBertConfig(
        **_ENCODER, **_IDS, cls_token_id=CLS, sep_token_id=SEP, local_attention=8
    ),
    "deberta": lambda: tf.DebertaV2Config(**_ENCODER, type_vocab_size=2),
    "deberta-v3": lambda: tf.DebertaV2Config(
        **_ENCODER, type_vocab_size=0, relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
    ),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=24,
        max_position_embeddings=POSITIONS,
    ),
    "electra": lambda: tf.ElectraConfig(**_ENCODER, embedding_size=8),
    "xlnet": lambda: tf.XLNetConfig(
        vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24, **_IDS
    ),
}  # fmt: skip
END_TOKEN: dict[str, Callable[[], Any]] = {
    "t5": lambda: tf.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=SEP,
    ),
    "bart": lambda: tf.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=POSITIONS,
        decoder_start_token_id=SEP, **_IDS,
    ),
}  # fmt: skip
DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2, **_IDS
    ),
    "llama": lambda: tf.LlamaConfig(**_DECODER),
    "qwen3": lambda: tf.Qwen3Config(**_DECODER),
    "gemma": lambda: tf.GemmaConfig(**_DECODER),
    "mixtral": lambda: tf.MixtralConfig(**_DECODER, num_local_experts=2, num_experts_per_tok=1),
}
CLASSIFIERS = {**ENCODERS, **END_TOKEN, **DECODERS}
CHAT: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: tf.Qwen2Config(**_DECODER),
    "gemma2": lambda: tf.Gemma2Config(**_DECODER),
    "gemma3": lambda: tf.Gemma3TextConfig(**_DECODER),
    "mistral": lambda: tf.MistralConfig(**_DECODER),
    "phi": lambda: tf.PhiConfig(**{k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "phi3": lambda: tf.Phi3Config(**_DECODER),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(
        **_DECODER, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=24
    ),
}
"""Further language models, near kin of the decoders above: tried in whole runs alone."""


def tokenizer(family: str, **more: Any) -> Any:
    """As the family's own: frames, token types and side of the padding."""
    if family == "qwen2":  # transformers makes its tokenizer anew, of bytes
        letters = {letter: len(SPECIALS) + n for n, letter in enumerate("w0123456789\u0120")}
        known = {word: number for number, word in enumerate(SPECIALS)} | letters
        return tf.Qwen2Tokenizer(known, [], pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    words = {word: number for number, word in enumerate([*SPECIALS, *(f"w{n}" for n in range(WORDS))])}
    fast = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single, pair = _frames(family)
    if single:
        fast.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[("<s>", CLS), ("</s>", SEP)]
        )
    typed = family in ("bert", "albert", "deberta", "deberta-v3", "electra", "xlnet")
    names = ["input_ids", "token_type_ids", "attention_mask"] if typed else ["input_ids", "attention_mask"]
    settings: dict[str, Any] = {
        "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "model_input_names": names,
        "padding_side": "left" if family == "xlnet" else "right",
    }  # fmt: skip
    return tf.PreTrainedTokenizerFast(tokenizer_object=fast, **{**settings, **more})


def _frames(family: str) -> tuple[str, str]:
    if family == "xlnet":
        return "$A:0 </s>:0 <s>:2", "$A:0 </s>:0 $B:1 </s>:1 <s>:2"
    if family in END_TOKEN:
        return "$A </s>", "$A </s> $B </s>"
    if family in DECODERS:
        return "", ""
    return "<s>:0 $A:0 </s>:0", "<s>:0 $A:0 </s>:0 $B:1 </s>:1"


def save(directory: Path, family: str, kind: str = "SequenceClassification", **more: Any) -> Path:
    """A random model of a family and its tokenizer; ``more`` goes into its configuration."""
    config = {**CLASSIFIERS, **CHAT}[family]()
    config.num_labels = LABELS
    for name, value in more.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = getattr(tf, f"AutoModelFor{kind}").from_config(config)
        for parameter in model.parameters():  # so that every part is felt
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(directory)
    tokenizer(family).save_pretrained(directory)
    return directory


def words(*lengths: int, seed: int = 0) -> list[str]:
    """Texts of so many words each."""
    g = torch.Generator().manual_seed(seed)
    numbers = [torch.randint(0, WORDS, (length,), generator=g).tolist() for length in lengths]
    return [" ".join(f"w{n}" for n in row) for row in numbers]
