"""The models that `experiments.benchmarks.gpu` measures, at random, and the ways to train them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as tf
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import nn

from clients.training.batched import BatchSettings, Member, train_cohort
from clients.training.dp_mechanism import Mechanism
from clients.training.dp_sgd import train_private
from clients.training.train import train_local
from fedlora.config import LoraConfig, TrainConfig
from fedlora.core.init_drawn import fresh_adapters
from fedlora.data.examples import Examples
from fedlora.models import AdaptedModel, resolve_targets
from fedlora.tasks import task_named

RANK, SEED, HELD = 8, 0, 64
"""LoRA's rank; where streams begin; examples that a client holds."""
MECHANISM = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}


def _bert(hidden: int, layers: int, heads: int, inner: int, vocabulary: int) -> Callable[[], Any]:
    return lambda: tf.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner,
        vocab_size=vocabulary, num_labels=2,
    )  # fmt: skip


def _llama(
    hidden: int, layers: int, heads: int, keys: int, inner: int, vocabulary: int = 128_256, tied: bool = True
) -> Callable[[], Any]:
    return lambda: tf.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "tiny-bert": _bert(32, 2, 2, 48, 200),
    "tiny-llama": _llama(32, 2, 2, 1, 48, 200),
    "minilm": _bert(384, 12, 12, 1536, 30_522),
    "roberta-large": lambda: tf.RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, num_labels=2,
    ),
    "llama-1b": _llama(2048, 16, 32, 8, 8192),
    "llama-3b": _llama(3072, 28, 24, 8, 8192),
    "llama-8b": _llama(4096, 32, 32, 8, 14_336, tied=False),
}  # fmt: skip
"""The published shapes, by size."""


class Bench:
    """One model on a device, in one precision.

    Args:
        name: of `MODELS`.
        precision: of passes; the weights are float32.
        options: the command's.
        device: where it is.
    """

    def __init__(self, name: str, precision: str, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device = options, device
        config = MODELS[name]()
        self.language = config.model_type == "llama"
        self.task = task_named("causal-lm" if self.language else "classification")
        kind: Any = tf.AutoModelForCausalLM if self.language else tf.AutoModelForSequenceClassification
        torch.manual_seed(SEED)
        with device:
            self.network: Any = kind.from_config(config, dtype=torch.float32).eval()
        self.network.config.use_cache = False
        self.dtype = getattr(torch, precision)
        self.vocabulary = config.vocab_size

    def batch(self, examples: int) -> dict[str, torch.Tensor]:
        """Made-up tokens, as a task's batch."""
        shape = (examples, self.options.tokens)
        ids = torch.randint(1, self.vocabulary, shape, device=self.device)
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.new_zeros(examples)
        }  # fmt: skip

    def loss(self, network: nn.Module, examples: int) -> torch.Tensor:
        """The task's mean loss in the precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.task.loss(network, self.batch(examples), "mean")

    def frozen(self, clients: int) -> Callable[[int], object]:
        """Forward and backward to the embeddings of all batches at once; no weight has a gradient."""
        self.network.requires_grad_(False)
        embeddings = self.network.get_input_embeddings()
        embeddings.register_forward_hook(lambda *given: given[2].detach().requires_grad_(True))

        def steps(number: int) -> None:
            for _ in range(number):
                self.loss(self.network, clients * self.options.batch_size).backward()

        return steps

    def bare(self, clients: int) -> Callable[[int], object]:
        """PEFT and torch alone, one client after another, each with a new optimiser."""
        kind = "CAUSAL_LM" if self.language else "SEQ_CLS"
        network = get_peft_model(self.network, PeftLoraConfig(task_type=kind, r=RANK, lora_alpha=2 * RANK))
        network.train()
        trained = [p for p in network.parameters() if p.requires_grad]

        def train(steps: int) -> None:
            for _ in range(clients):
                optimizer = torch.optim.AdamW(trained, lr=1e-4)
                for _ in range(steps):
                    optimizer.zero_grad()
                    self.loss(network, self.options.batch_size).backward()
                    optimizer.step()

        return train

    def ours(self, clients: int, *, together: bool, private: bool) -> Callable[[int], object]:
        """Local steps of all clients by fedlora."""
        model = AdaptedModel(self.network, resolve_targets(self.network, ""), self.task)
        model.precision = self.dtype
        adapters = fresh_adapters(model.modules, RANK, LoraConfig(rank=RANK).scaling(RANK), SEED)
        size, tokens = self.options.batch_size, self.options.tokens
        rng = np.random.default_rng(SEED)
        number = clients * HELD
        examples = Examples(
            tokens=rng.integers(1, self.vocabulary, number * tokens).astype(np.int32),
            offsets=np.arange(number + 1) * tokens,
            labels=np.zeros(number, dtype=np.int64),
            domains=np.zeros(number, dtype=np.int32),
        )
        config = TrainConfig(batch_size=size, learning_rate=1e-4)
        head = bool(model.initial_head)

        mechanism = Mechanism(expected_batch_size=size, **MECHANISM) if private else None

        def own(client: int) -> Any:
            return np.arange(client * HELD, (client + 1) * HELD)

        def one_by_one(steps: int) -> None:
            for client in range(clients):
                model.load(adapters, {}, trained=frozenset("AB"), train_head=head)
                common: Any = (model, examples, own(client), 0, config)
                if mechanism is not None:
                    train_private(*common, local_steps=steps, mechanism=mechanism, seed=client)
                else:
                    train_local(*common, local_steps=steps, seed=client)

        def cohort(steps: int) -> None:
            members = [
                Member(
                    adapters=adapters, head={}, trained=frozenset("AB"), modules=frozenset(adapters),
                    train_head=head, indices=own(client), steps=steps, seed=client, mechanism=mechanism,
                )
                for client in range(clients)
            ]  # fmt: skip
            train_cohort(model, members, BatchSettings(examples=examples, pad_token_id=0, config=config))

        return cohort if together else one_by_one


FROZEN = "frozen model"
WAYS: dict[str, Callable[[Bench, int], Callable[[int], object]]] = {
    FROZEN: Bench.frozen,
    "bare loop": Bench.bare,
    "one by one": partial(Bench.ours, together=False, private=False),
    "cohort": partial(Bench.ours, together=True, private=False),
    "one by one, private": partial(Bench.ours, together=False, private=True),
    "cohort, private": partial(Bench.ours, together=True, private=True),
}
ALONE = ("bare loop", "one by one", "one by one, private")
"""Their tokens a second do not depend on how many clients there are."""
