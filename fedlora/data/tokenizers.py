"""From a model's name to its tokenizer: a directory of files, or one without files."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from fedlora.assets.fetch import file_sha256
from fedlora.assets.models import BUILT_IN_MODELS, model_directory
from fedlora.data.built_in_tokenizers import ByteTokenizer, TinyTokenizer
from fedlora.data.chat.template import ChatSettings
from fedlora.data.chat.tokenise import Chats, ChatTokenizer
from fedlora.errors import AssetError, ConfigError, first_line

TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json",
    "config.json", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
"""What a tokenizer is read from; the model's config.json says of which kind it is."""
_MASKED = ("input_ids", "special_tokens_mask")


Framed: TypeAlias = tuple[Sequence[Sequence[int]], Sequence[Sequence[int]] | None]
"""Token ids of each text; token types of each, or None where the tokenizer gives none."""


class Tokenizer(ChatTokenizer, Protocol):
    """Interface of a tokenizer that data are prepared by."""

    @property
    def identity(self) -> str:
        """Differs where two tokenizers could give different ids."""

    @property
    def pad_token_id(self) -> int:
        """Fills up a batch."""

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> Framed:
        """Token ids and types of each text (with its pair), specials added, cut to ``max_length``."""

    @property
    def end_token_id(self) -> int:
        """Ends a text of a language model."""

    def documents(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Token ids of each text with what the tokenizer puts before it, and the end token after it."""


class PretrainedTokenizer(Chats):
    """A tokenizer of transformers in a directory; transformers is imported when first needed."""

    def __init__(self, directory: Path, name: str, settings: ChatSettings | None = None) -> None:
        self.directory = directory
        self.name = name
        self.settings = settings or ChatSettings()

    @cached_property
    def identity(self) -> str:
        """A hash over the tokenizer's files, and how it is to write conversations.

        Raises:
            ConfigError: the directory holds no tokenizer.
        """
        files = sorted({file for pattern in TOKENIZER_FILES for file in self.directory.glob(pattern)})
        if not any(file.name != "config.json" for file in files):
            raise ConfigError(
                f"model.name = {self.name!r}: holds no tokenizer (tokenizer.json, vocab.txt, ...)"
            )
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        digest.update(self.settings.identity.encode())
        return digest.hexdigest()

    @property
    def pad_token_id(self) -> int:
        """The padding token, else (with a warning) the end-of-sequence token.

        Raises:
            ConfigError: the tokenizer has neither.
        """
        pad, eos = self._loaded.pad_token_id, self._loaded.eos_token_id
        if pad is None and eos is None:
            raise ConfigError(f"model.name = {self.name!r}: its tokenizer has no padding or end token")
        if pad is None:
            warnings.warn(
                f"model.name = {self.name!r}: no padding token, batches are padded with the end token",
                stacklevel=2,
            )
        return int(eos if pad is None else pad)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int) -> Framed:
        """Token ids of each text (with its pair), specials added, cut to ``max_length``, not padded.

        And their types where transformers' own pipeline would give them to the model: where they are among
        the tokenizer's ``model_input_names``.

        Raises:
            ConfigError: the model takes only shorter sequences.
        """
        longest = self._loaded.model_max_length
        if max_length > longest:
            raise ConfigError(f"data.max-length = {max_length}: {self.name!r} takes at most {longest} tokens")
        encoded = self._loaded(
            list(texts), None if pairs is None else list(pairs), truncation=True, max_length=max_length
        )
        return encoded["input_ids"], encoded.get("token_type_ids")

    @property
    def end_token_id(self) -> int:
        """The end-of-sequence token.

        Raises:
            ConfigError: the tokenizer has none.
        """
        if self._loaded.eos_token_id is None:
            raise ConfigError(f"model.name = {self.name!r}: its tokenizer has no end token")
        return int(self._loaded.eos_token_id)

    def pieces(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Token ids of each text, whole and without specials."""
        found = self._loaded(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = found["input_ids"]
        return ids

    def documents(self, texts: Sequence[str]) -> Sequence[list[int]]:
        """Token ids of each text with what the tokenizer puts before it, once, and the end token after it."""
        opening, end = self.opening, self.end_token_id
        return [
            [*([] if ids[: len(opening)] == opening else opening), *ids, end] for ids in self.pieces(texts)
        ]

    @cached_property
    def opening(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text, for instance that of its first token."""
        framed = self._loaded("a", return_special_tokens_mask=True)
        special = takewhile(lambda pair: pair[1], zip(*map(framed.get, _MASKED), strict=True))
        return [int(token) for token, _ in special]

    @property
    def end_text(self) -> str:
        """The end-of-sequence token as text.

        Raises:
            ConfigError: the tokenizer has none.
        """
        if self._loaded.eos_token is None:
            raise ConfigError(
                f"model.name = {self.name!r}: its tokenizer has neither a chat template nor an end token, "
                "set model.chat-template"
            )
        return str(self._loaded.eos_token)

    @cached_property
    def marks(self) -> frozenset[int]:
        """The ids of the special and of the added tokens."""
        return frozenset([*self._loaded.all_special_ids, *self._loaded.get_added_vocab().values()])

    @property
    def variables(self) -> Mapping[str, Any]:
        """The special tokens by name."""
        named: dict[str, Any] = self._loaded.special_tokens_map
        return named

    def template(self, tools: bool) -> str | None:
        """The tokenizer's chat template; of several the default, or that for tools.

        Raises:
            ConfigError: it has several and no default.
        """
        if not self._loaded.chat_template:
            return None
        try:
            return str(self._loaded.get_chat_template(tools=[] if tools else None))
        except ValueError as error:
            raise ConfigError(
                f"model.name = {self.name!r}: {first_line(error)}; set model.chat-template"
            ) from None

    def spans(self, text: str) -> Sequence[tuple[int, int]] | None:
        """First and one past the last character of each token; None where the tokenizer is a slow one."""
        if not self._loaded.is_fast:
            return None
        found = self._loaded(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans: list[tuple[int, int]] = found["offset_mapping"]
        return spans

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; specials are left out."""
        return str(self._loaded.decode(list(ids), skip_special_tokens=True))

    def save(self, directory: Path) -> None:
        """Write it as transformers reads it, with a padding token and the chat template of the settings."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if self.settings.template:
            tokenizer.chat_template = self.settings.template
        tokenizer.save_pretrained(directory)

    @cached_property
    def _loaded(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False)
        except Exception as error:  # of somebody's files
            raise ConfigError(
                f"model.name = {self.name!r}: its tokenizer cannot be read ({first_line(error)})"
            ) from None


def load_tokenizer(name: str, settings: ChatSettings | None = None) -> Tokenizer:
    """The tokenizer of ``model.name``: a built-in model, a directory, or a hub id.

    ``settings`` say how it writes conversations; without them as it does by itself.

    Raises:
        ConfigError: no such directory, or no tokenizer in it.
        AssetError: it could not be fetched.
    """
    if name == "tiny":
        return TinyTokenizer(settings)
    if name == "tiny-lm":
        return ByteTokenizer(settings)
    directory = model_directory(name) or Path(name).expanduser()
    if directory.is_dir():
        return PretrainedTokenizer(directory, name, settings)
    if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ConfigError(f"model.name = {name!r}: no such directory")
    return PretrainedTokenizer(_from_hub(name), name, settings)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ConfigError(f"{_absent(name)}, and no hub id ({first_line(error)})") from None
    except OSError as error:
        raise AssetError(f"{_absent(name)}, and the hub gives none ({first_line(error)})") from None


def _absent(name: str) -> str:
    return f"model.name = {name!r}: not built in ({', '.join(BUILT_IN_MODELS)}), no directory"
