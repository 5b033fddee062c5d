"""An adapter that fedlora wrote, opened for use: labels of texts and pictures, or texts that go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fedlora.core.files import user_path
from fedlora.data.chat.conversations import Turn
from fedlora.data.chat.template import ChatSettings
from fedlora.data.chat.tokenise import asked
from fedlora.data.columns import PICTURE
from fedlora.data.examples import Examples, collate
from fedlora.data.images import UNREADABLE, fitted
from fedlora.data.targets import MULTI_LABEL, REGRESSION
from fedlora.errors import ConfigError, first_line
from fedlora.evaluation.items import Item, checked
from fedlora.models import AdapterCard
from fedlora.models.export import load_adapter
from fedlora.models.fit import most_positions
from fedlora.tasks import SINGLE_LABEL, task_named
from fedlora.tasks.task import Rows, inputs

BATCH = 32
"""Examples of a pass."""
OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    SINGLE_LABEL: lambda logits: logits.softmax(dim=-1),
    MULTI_LABEL: torch.sigmoid,
    REGRESSION: lambda logits: logits,
}
"""What is told of logits (rows, K)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model says of one example, whatever its task.

    Attributes:
        labels: the most probable one; of a multi-label classifier those with a probability above 1/2; of a
            regression none.
        probabilities: of every label; empty for a regression.
        values: of every target of a regression; else empty.
    """

    labels: tuple[str, ...] = ()
    probabilities: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The most probable label.

        Raises:
            ConfigError: a regression, which has values.
        """
        if not self.probabilities:
            raise ConfigError(f"label: a regression has none, values has {', '.join(self.values)}")
        return max(self.probabilities, key=self.probabilities.__getitem__)

    @property
    def probability(self) -> float:
        """Of `label`."""
        return self.probabilities[self.label]


class LoadedAdapter:
    """An adapter over its base, in evaluation mode.

    Attributes:
        model: the ``PeftModel``.
        card: what it was trained for, and its labels.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        """Open a directory that a run wrote.

        Raises:
            ConfigError: no adapter that fedlora wrote, or a base that is not here.
            AssetError: a built-in base that could not be fetched.
        """
        self.directory = user_path(Path(directory))
        self.model: nn.Module
        self.card: AdapterCard
        self.model, self.card = load_adapter(self.directory)

    @property
    def of_pictures(self) -> bool:
        """Whether pictures are predicted, not texts."""
        return task_named(self.card.task).network == "image-classifier"

    def predict(self, items: Iterable[Item]) -> list[Prediction]:
        """The label of each text, pair of texts or picture; its labels, or its numbers, as the task is.

        Texts are cut to the tokens that were trained on; pictures of any size and mode become the model's.

        Args:
            items: a list, a pandas ``Series``, a NumPy array of texts, or another thing with an order.

        Raises:
            ConfigError: a language model, what is neither texts nor pictures in an order (a table, one text),
                a text without a token, or a picture that cannot be read.
        """
        task = task_named(self.card.task)
        if not task.labelled:
            raise ConfigError(f"{self.directory}: a language model of {self.card.task} predicts no labels")
        found: list[Prediction] = []
        given = checked(items, pictures=self.of_pictures)
        for start in range(0, len(given), BATCH):
            found += self._predicted(given[start : start + BATCH])
        return found

    def generate(self, prompt: str | Sequence[dict[str, Any]], *, max_new_tokens: int = 128) -> str:
        """How the model goes on after a text, or answers messages; always the likeliest token.

        Args:
            prompt: messages with ``role`` and ``content``, or a text: of an instruction model one message,
                of another what is continued.
            max_new_tokens: written at most.

        Raises:
            ConfigError: a classifier, an empty prompt, one with more tokens than the model has positions for,
                what is neither a text nor messages, or messages that the chat template refuses.
        """
        if task_named(self.card.task).labelled:
            raise ConfigError(f"{self.directory}: a classifier generates no text")
        ids = self._tokens(prompt)
        if not ids:
            raise ConfigError("the prompt has no token for this model's tokenizer")
        most = most_positions(self.model)
        if most is not None and len(ids) >= most:
            raise ConfigError(f"the prompt has {len(ids)} tokens, the model takes fewer than {most}")
        if most is not None:
            max_new_tokens = min(max_new_tokens, most - len(ids))
        given, model = torch.tensor([ids], device=next(self.model.parameters()).device), self.model
        pad = self._reader.pad_token_id
        with torch.inference_mode():
            written: Any = model.generate(  # type: ignore[operator]
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens,
                do_sample=False, use_cache=True, pad_token_id=pad, eos_token_id=self._ends(),
            )  # fmt: skip
        return str(self._reader.decode(written[0, len(ids) :].tolist()))

    @cached_property
    def _reader(self) -> Any:
        model = self.card.model
        chat = ChatSettings(model.chat_template, model.template_variables, self.card.assistant_loss)
        return task_named(self.card.task).reader(model.name, chat)

    def _predicted(self, items: Sequence[Item]) -> Iterator[Prediction]:
        task = task_named(self.card.task)
        encoded = task.encode([self._rows(items)], self._reader, self.card.max_length)
        none = np.zeros(len(items), dtype=np.int64)
        examples = Examples(
            tokens=np.concatenate(encoded.values),
            offsets=np.cumsum([0, *map(len, encoded.values)]),
            labels=none,
            domains=none.astype(np.int32),
            types=None if encoded.types is None else np.concatenate(encoded.types),
            image=encoded.image,
        )
        batch = collate(examples, range(len(items)), self._reader.pad_token_id)
        device = next(self.model.parameters()).device
        placed = {name: tensor.to(device) for name, tensor in inputs(self.model, batch).items()}
        with torch.inference_mode():
            logits = self.model(**placed).logits.float()
        for row in OUTPUTS[task.problem_type](logits).tolist():
            found = dict(zip(self.card.label_names, row, strict=True))
            if task.problem_type == REGRESSION:
                yield Prediction(values=found)
            elif task.problem_type == MULTI_LABEL:
                above = tuple(label for label, probability in found.items() if probability > 0.5)
                yield Prediction(labels=above, probabilities=found)
            else:
                yield Prediction(labels=(max(found, key=found.__getitem__),), probabilities=found)

    def _rows(self, items: Sequence[Item]) -> Rows:
        if self.of_pictures:
            return {PICTURE: [self._pixels(item) for item in items]}
        pairs = [item for item in items if isinstance(item, tuple)]
        if pairs and len(pairs) < len(items):
            raise ConfigError(f"{self.directory}: takes texts, or pairs of texts, not both at once")
        if not pairs:
            return {"text": list(items)}
        return {"text": [first for first, _ in pairs], "text_pair": [second for _, second in pairs]}

    def _pixels(self, item: Item) -> bytes:
        if isinstance(item, Image.Image):
            return fitted(item, self._reader.form).tobytes()
        try:
            with Image.open(item) as picture:  # type: ignore[arg-type]
                return fitted(picture, self._reader.form).tobytes()
        except UNREADABLE as error:
            raise ConfigError(f"{item}: cannot be read as a picture ({first_line(error)})") from None

    def _tokens(self, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
        if isinstance(prompt, str) and self.card.task == "instruction":
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            opening, ids = list(self._reader.opening), list(self._reader.pieces([prompt])[0])
            return [*([] if ids[: len(opening)] == opening else opening), *ids]
        if not isinstance(prompt, Sequence) or not all(_is_message(message) for message in prompt):
            raise ConfigError("the prompt: takes a text, or messages with role and content")
        messages: Sequence[Any] = prompt
        turns = [Turn(str(message["role"]), str(message["content"])) for message in messages]
        return asked(turns, self._reader, "the prompt")

    def _ends(self) -> list[int]:
        """Tokens that end a text or a turn."""
        said = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        own = said if isinstance(said, list) else [] if said is None else [said]
        return sorted({int(self._reader.end_token_id), *map(int, own)})


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()
