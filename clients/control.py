"""SCAFFOLD's control variates on what a client trains, where all clients take part in every round.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020
(arXiv 1910.06378), option II. With x_t the model of round t, K steps of size eta, and g a batch's gradient,

    y_k = x_t - eta sum_K (g - c_k + c),    c_k <- c_k - c + (x_t - y_k) / (K eta),    x_{t+1} = sum_k p_k y_k

Where everybody takes part c = sum_k p_k c_k, whose change is (x_t - x_{t+1}) / (K eta), so that a client that
goes on from x_{t+1} needs no c: with d_k = K eta (c_k - c), zero at first,

    d_k <- d_k + x_{t+1} - y_k

(the form of Mishchenko et al., ICML 2022, arXiv 2202.09357). Nothing but y_k and x_t travels, half of what
SCAFFOLD's c and its changes would double. Kept between rounds is d_k - y_k, with the client's other files.
"""

from __future__ import annotations

from clients.runtime import ClientRuntime
from clients.store import ClientStore, ResolvedInstruction
from clients.training.batches import num_steps
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.core.adapters import tensor_names
from fedlora.core.factors import Tensors

CONTROL = "control"
"""Name of what is kept, in PEFT's spelling."""


def off_gradients(
    runtime: ClientRuntime,
    resolved: ResolvedInstruction,
    server_round: int,
    config: RunConfig,
    partition_id: int,
) -> Tensors:
    """``c_k - c = d_k / (K eta)``, to be taken off each gradient, by the names of `Trainable`.

    Every tensor has the eta that it is trained at. Nothing in a client's first round, and nothing without
    ``train.control-variates``.
    """
    if not config.train.control_variates:
        return {}
    train, count = config.train_of(partition_id), len(runtime.data.indices(partition_id))
    steps = num_steps(train, count, config.local_steps_of(partition_id))
    begun = wire.to_peft(resolved.adapters, resolved.head)
    d = _differences(resolved.store, partition_id, server_round, begun)
    parts, rate = wire.from_peft(d, tensor_names(resolved.adapters)), train.learning_rate
    etas = {"B": rate * train.loraplus_lr_ratio}
    found = {
        f"{module}.{name}": tensor / (steps * etas.get(name, rate))
        for module, tensors in parts.layers.items()
        for name, tensor in tensors.items()
    }
    return found | {n: t / (steps * (train.head_learning_rate or rate)) for n, t in parts.head.items()}


def keep_control(
    store: ClientStore, partition_id: int, server_round: int, start: Tensors, trained: Tensors
) -> None:
    """Keep ``d_k - y_k`` of what was trained from ``start``; of what rested, what was kept of it."""
    kept = store.personal(partition_id, CONTROL, server_round) or {}
    d = _differences(store, partition_id, server_round, start)
    moved = {name: d[name] - y if name in d else -y for name, y in trained.items()}
    store.keep_personal(partition_id, CONTROL, server_round, {**kept, **moved})


def _differences(store: ClientStore, partition_id: int, server_round: int, start: Tensors) -> Tensors:
    """d_k of the tensors that a round starts from, where they were trained before."""
    kept = store.personal(partition_id, CONTROL, server_round) or {}
    return {name: kept[name] + tensor for name, tensor in start.items() if name in kept}
