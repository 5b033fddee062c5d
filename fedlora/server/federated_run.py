"""One run: a configuration becomes a strategy, its rounds become a run directory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from clients.privacy import mechanism_of
from clients.rehearsal import rehearse
from fedlora.core.state import ServerState, State
from fedlora.errors import ConfigError, RunFailed
from fedlora.server.best import best_state, has_ended
from fedlora.server.build import assemble
from fedlora.server.callbacks import Callback, Checkpoint, Evaluate, KeepBest, Record, Track
from fedlora.server.directory import RunDirectory
from fedlora.server.inputs import device_of, inputs_by_device
from fedlora.server.published import append_release, counted, read_participations
from fedlora.server.session import Session
from fedlora.server.validate import check, check_time, kept


class FederatedRun:
    """Everything between a session of an engine and a run directory.

    Args:
        session: the configuration, model and data; see `Session`.
        directory: where the results go; a checkpoint in it is resumed.
        callbacks: called after the run's own, see `fedlora.server.callbacks`.

    Attributes:
        config: what to do.
        runtime: the server's model and data.
        strategy: with the state before the next round.
        run_key: names the run towards its clients.
        personal: clients keep something trained to themselves, so that only they can measure their models.
        before: the evaluation before round 1 as a record, where this process has just made it.

    Raises:
        ConfigError, NotApplicable, LedgerRefused: what cannot be carried out; nothing was written.
    """

    def __init__(self, session: Session, directory: RunDirectory, callbacks: Sequence[Callback] = ()) -> None:
        self.session, self.directory = session, directory
        self.config, self.runtime = session.config, session.runtime
        self.callbacks = (Evaluate(), Record(), Track(), Checkpoint(), KeepBest(), *callbacks)
        self.before: dict[str, Any] = {}
        rule = check(self.config)
        check_time(self.config.devices, simulated=session.stores is not None)
        self.personal = bool(kept(self.config, rule))
        privacy = mechanism_of(self.config)
        privacy.check_data(self.runtime.data if session.nodes is None else None, self.partitions)
        self.strategy = assemble(
            rule,
            self.config,
            self.runtime,
            self.partitions,
            simulation=session.stores is not None,
            packed=session.nodes is not None,
            known_examples=self._known_examples,
            node_directory=session.node_directory,
            peers=session.peers,
        )
        adapters = self.state.adapters
        trained = rule.trained_names(adapters.values(), 1)
        rehearse(self.runtime, self.config, adapters, self.state.head, trained)
        checkpoint = directory.load_checkpoint()
        published = read_participations(directory.path)
        participations = counted(self.config, checkpoint, published, directory.rounds())
        if session.stores is not None:
            heads = {} if checkpoint is None else checkpoint.ledger_heads
            privacy.check_ledgers(self.runtime.data, self.partitions, session.stores, heads)
        given = inputs_by_device(self.config, self.runtime) if session.nodes is None else {}
        inputs = given.get(device_of(self.config) or "")
        continues, done = checkpoint is not None, 0 if checkpoint is None else checkpoint.state.round
        directory.open(self.config, inputs, continues=continues, done=done, elsewhere=given.values())
        self.run_key = directory.run_key()
        self._restore(checkpoint, participations)

    @property
    def state(self) -> State:
        """The rule's state between two rounds."""
        assert self.strategy.state is not None
        return self.strategy.state

    @property
    def partitions(self) -> Collection[int]:
        """The partitions that may take part."""
        nodes = self.session.nodes
        there = self.runtime.data.clients if nodes is None else sorted(nodes)
        chosen = self.config.partition_list
        for partition in sorted({*chosen} & {*self.left_out}):
            raise ConfigError(
                f"partitions = {self.config.partitions!r}: partition {partition} cannot take part, "
                f"{self.left_out[partition]}"
            )
        if not all(partition in there for partition in chosen):
            whose = "the data has" if nodes is None else "the nodes are"
            raise ConfigError(
                f"partitions = {self.config.partitions!r}: {whose} partitions {there[0]} to {there[-1]}"
            )
        return chosen or there

    @property
    def left_out(self) -> Mapping[int, str]:
        """Partitions of the data here that have no example to train on, and why."""
        return self.runtime.data.left_out if self.session.nodes is None else {}

    @property
    def without(self) -> Mapping[int, str]:
        """Partitions that take no part, and why: no example to train on, or a device that is too small."""
        clock = self.session.clock
        return {**self.left_out, **({} if clock is None else clock.unfit)}

    def _known_examples(self, partition: int) -> int | None:
        """Examples that a partition has at most: those here, or what its owner declared to the server."""
        if self.session.nodes is not None:
            return self.session.declared_examples.get(partition)
        return len(self.runtime.data.indices(partition)) if self.session.stores is not None else None

    def run(self, grid: Grid | None = None) -> dict[str, Any]:
        """All remaining rounds, then the whole test set and the adapter; returns the result record.

        Args:
            grid: reaches the clients; by default that of the session.

        Raises:
            RunFailed: too few clients or valid updates; what was written before is kept.
        """
        grid = grid or self.session.grid(self)
        timeout = self.config.round_timeout
        last = self.state.round if self._has_ended() else self.config.num_server_rounds
        told = ConfigRecord({"run-key": self.run_key, "labels": list(self.runtime.data.label_names)})
        if self.session.nodes is not None and self.config.model.quantization == "none":
            told["base-digest"] = self.runtime.model.base_digest()
        with ExitStack() as closing:
            for callback in self.callbacks:
                callback.before_run(self)
                closing.callback(callback.close)
            for report in self.strategy.rounds(grid, last, timeout, told, told):
                for callback in self.callbacks:
                    callback.after_round(self, report)
                if self._has_ended():
                    break
            self._verify()
            self.strategy.state = best_state(self)
            result: dict[str, Any] = {}
            for callback in self.callbacks:
                callback.after_run(self, result)
        self.directory.write_result(result)
        return result

    def _has_ended(self) -> bool:
        """Whether no further round is to be done, for want of better ones."""
        return self.config.early_stopping_patience > 0 and has_ended(self.config, self.directory.rounds())

    def _restore(self, checkpoint: ServerState | None, participations: dict[int, int]) -> None:
        if checkpoint is not None:
            self.strategy.restore(checkpoint)
        self.strategy.selection.participations = participations
        self.strategy.before_publishing = partial(append_release, self.directory.path)
        self.directory.keep_rounds(self.state.round)

    def _verify(self) -> None:
        try:
            self.session.verify()
        except RunFailed as error:
            self.directory.condemn(str(error))
            raise
