"""The run directory: what a run was asked, what happened round by round, and how to go on after a crash.

    config.toml       the resolved configuration
    provenance.json   versions, commit, hardware, and the identity by which studies know a run again
    before.json       the pretrained model on the whole test set, where it needs no trained head
    samples.json      what a language model writes, before round 1, after some rounds and after the last
    rounds.jsonl      one JSON object a round
    published.jsonl   what left a server under client-level noise that nobody can draw again; never set back
    result.json       the last round and the evaluation on the whole test set
    checkpoint/       everything needed to resume with the same bits
    best/             the same after the best round, where that is kept
    adapter/          the global adapter in PEFT's format
    clients/          what simulated clients hold between rounds
    spoiled.txt       why the run cannot be relied on or resumed, if that was found
    failed.json       why a study's run stopped; its other runs went on

Files are replaced atomically; ``rounds.jsonl`` is flushed before the checkpoint, so that a resumed run drops
at most the line of a round that was not checkpointed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from logging import WARNING
from pathlib import Path
from typing import Any
from uuid import uuid4

import tomli_w
from flwr.common.logger import log

from fedlora.config import RunConfig, read_config, to_flat, unflatten
from fedlora.core.files import append_line, check_place, write_atomic
from fedlora.core.sealed import FILES_SHA256, hashes, read_sealed, sealed
from fedlora.core.state import ServerState
from fedlora.errors import ConfigError
from fedlora.server.checkpoint import read_beside, read_checkpoint, write_checkpoint
from fedlora.server.identity import UNRECORDED, Identity, config_digest, recorded
from fedlora.server.provenance import PROVENANCE, check_schema, provenance, read_provenance
from fedlora.server.published import drop_half_line
from fedlora.server.results import (
    BEFORE,
    CONFIG,
    PUBLISHED,
    RESULT,
    ROUNDS,
    RUN_KEY,
    SAMPLES,
    read_lines,
    read_rounds,
    read_samples,
)
from fedlora.server.resumed import check_keys, only_tried, other_inputs

CHECKPOINT = "checkpoint"
BESIDE = (PROVENANCE, BEFORE, SAMPLES)
"""What is made before round 1 and cannot be made again after it: a checkpoint names those that there are."""
GROWING = {"lines": ROUNDS, "published": PUBLISHED}
"""Files to which lines are added; a checkpoint counts their bytes and has the digest of these."""
NAME_OF_RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")
SPOILED = "spoiled.txt"
"""Why the rounds that were done cannot be relied on; there only if so."""


class RunDirectory:
    """One run's files.

    Args:
        path: made if it does not exist.
        resume: go on with what is there.
        shared: of a study, where its runs find what one has measured, see `fedlora.server.untrained`.

    Raises:
        ConfigError: the directory cannot be written, holds more than a run without a round and ``resume`` is
            off, a run of another schema, or one that was condemned.
    """

    def __init__(self, path: Path, *, resume: bool = False, shared: Path | None = None) -> None:
        self.path, self.shared = path, shared
        check_place("--out", path)
        if path.is_dir() and any(path.iterdir()) and not resume:
            if not only_tried(path):
                raise ConfigError(f"--out {path}: is not empty (use --resume to go on, or another directory)")
            for file in path.iterdir():
                file.unlink()
        path.mkdir(parents=True, exist_ok=True)
        check_schema(path / PROVENANCE)
        if (path / SPOILED).exists():
            raise ConfigError(f"--resume {path}: {_text(path / SPOILED)}; begin it anew elsewhere")

    def condemn(self, reason: str) -> None:
        """Mark the run as one that must never be resumed; its files stay."""
        write_atomic(self.path / SPOILED, reason + "\n")

    def open(
        self,
        config: RunConfig,
        inputs: str | None = None,
        *,
        continues: bool = False,
        done: int = 0,
        elsewhere: Collection[str] = (),
    ) -> None:
        """Write ``config.toml`` and ``provenance.json``; on resuming, check that the run is the same.

        Args:
            config: of the run.
            inputs: a digest of what it names, see `fedlora.server.inputs`.
            continues: rounds that were done before are part of it.
            done: their number.
            elsewhere: digests of the same inputs on other kinds of device, where a run may go on.

        Raises:
            ConfigError: a key differs that changes what the finished rounds mean, or the inputs do; nothing
                was written.
        """
        written = self.path / CONFIG
        if continues and not written.exists():
            raise ConfigError(
                f"{written}: is missing, so that nobody knows what the rounds that were done mean; put it "
                "back, or begin anew elsewhere"
            )
        flat = to_flat(config)
        if written.exists():
            try:
                before = read_config(written)
            except ConfigError as error:
                raise ConfigError(f"{written}: {error}") from None
            check_keys(config, before, self.path, continues=continues, done=done)
        self._check_inputs(config, inputs, elsewhere, continues=continues)
        write_atomic(written, tomli_w.dumps(unflatten(flat)))
        record = provenance(config, inputs, self._begun_as(config) if continues else None)
        if "+" in (code := record["identity"]["code"]) and code != self._begun_as(config).code:
            other = "%s: earlier rounds were computed by other code or libraries; %s has both"
            log(WARNING, other, self.path, PROVENANCE)
        write_atomic(self.path / PROVENANCE, json.dumps(sealed(record), indent=2) + "\n")

    def _check_inputs(
        self, config: RunConfig, inputs: str | None, elsewhere: Collection[str], *, continues: bool
    ) -> None:
        """Refuse other inputs than the rounds that were done had; without a round drop what they measured."""
        before = recorded(read_provenance(self.path / PROVENANCE))
        if before is None or before.inputs is None or inputs is None:
            return
        if continues and before.last_inputs not in {inputs, *elsewhere}:
            raise other_inputs(config, self.path)
        if not continues and before.inputs != inputs:
            for name in (BEFORE, SAMPLES):
                (self.path / name).unlink(missing_ok=True)

    def _begun_as(self, config: RunConfig) -> Identity:
        found = recorded(read_provenance(self.path / PROVENANCE))
        return found or Identity(config_digest(config), UNRECORDED, None)

    def run_key(self) -> str:
        """Names the run towards its clients: drawn once, so that a repeated round is the same release.

        Raises:
            ConfigError: rounds were done under a name that is not there any more.
        """
        file = self.path / RUN_KEY
        kept, found = self._kept_key(), _text(file) if file.exists() else ""
        if kept and kept != found:
            log(WARNING, "%s: was damaged or missing, the checkpoint has the key", file)
            write_atomic(file, kept + "\n")
            return kept
        if file.exists() and not NAME_OF_RUN.fullmatch(found):
            raise ConfigError(f"{file}: is damaged, {found!r} is no run's key; begin it anew elsewhere")
        if not file.exists():
            if (self.path / CHECKPOINT).exists():
                raise ConfigError(
                    f"--resume {self.path}: {RUN_KEY} is missing, by which clients and ledgers know the run; "
                    "begin it anew elsewhere"
                )
            write_atomic(file, uuid4().hex + "\n")
        return _text(file)

    def _kept_key(self) -> str:
        return str(read_beside(self.path / CHECKPOINT).get("run-key", ""))

    def before(self) -> dict[str, Any] | None:
        """The evaluation before round 1, if there was one."""
        file = self.path / BEFORE
        return read_sealed(file) if file.exists() else None

    def write_before(self, measured: dict[str, Any]) -> None:
        """Keep the evaluation before round 1."""
        write_atomic(self.path / BEFORE, json.dumps(sealed(measured), indent=2) + "\n")

    def write_samples(self, when: str, samples: list[dict[str, Any]]) -> None:
        """Add what the model writes ``before`` or ``after`` training."""
        written = sealed({**read_samples(self.path), when: samples})
        write_atomic(self.path / SAMPLES, json.dumps(written, indent=2) + "\n")

    # --- rounds ------------------------------------------------------------------------------------

    def append_round(self, record: dict[str, Any]) -> None:
        """Add one line to ``rounds.jsonl``, flushed to disk."""
        append_line(self.path / ROUNDS, json.dumps(record))

    def rounds(self) -> list[dict[str, Any]]:
        """The records so far; a half-written last line is left out."""
        return read_rounds(self.path)

    def keep_rounds(self, last: int) -> None:
        """Drop lines after round ``last``, of rounds that were not checkpointed, and what stands twice.

        What was published stays, less a line that was not written to its end.
        """
        kept: dict[int, str] = {}
        for record in self.rounds():
            if record["round"] <= last:
                kept.setdefault(record["round"], json.dumps(record) + "\n")
        write_atomic(self.path / ROUNDS, "".join(kept.values()))
        drop_half_line(self.path)

    def write_result(self, result: dict[str, Any]) -> None:
        """Replace ``result.json``, which vouches for the configuration, ``rounds.jsonl`` and samples."""
        files = [name for name in (CONFIG, ROUNDS, SAMPLES) if (self.path / name).exists()]
        record = sealed({**result, FILES_SHA256: hashes(self.path, files)})
        write_atomic(self.path / RESULT, json.dumps(record, indent=2) + "\n")

    # --- checkpoint ------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: ServerState, keep: int = 1) -> None:
        """Write the checkpoint, which vouches for the lines of `GROWING` files and the run's key.

        It names the files that a run which goes on cannot make again. ``keep`` checkpoints stay, see
        `write_checkpoint`.
        """
        beside: dict[str, Any] = {"files": [name for name in BESIDE if (self.path / name).exists()]}
        for key, name in GROWING.items():
            if written := _bytes(self.path / name):
                beside |= {key: len(written), f"{key}-sha256": hashlib.sha256(written).hexdigest()}
        if (self.path / RUN_KEY).exists():
            beside["run-key"] = _text(self.path / RUN_KEY)
        write_checkpoint(self.path / CHECKPOINT, checkpoint, beside, keep)

    def load_checkpoint(self) -> ServerState | None:
        """The last checkpoint, or None if no round was finished.

        Raises:
            ConfigError: a file of it or beside it, or a line that it counts, is missing or damaged.
        """
        beside = read_beside(self.path / CHECKPOINT)
        spare = self.path / "clients" / str(beside.get("run-key", "")) / "parts"
        found = read_checkpoint(self.path / CHECKPOINT, spare)
        if found is None and len(self.rounds()) > 1:
            raise ConfigError(
                f"{self.path / CHECKPOINT}: is missing, but {ROUNDS} has rounds; put it back, or begin "
                "anew elsewhere"
            )
        if found is not None:
            self._check_lines(beside)
            for name in beside.get("files", ()):
                if not (self.path / name).exists():
                    raise ConfigError(
                        f"{self.path / name}: is missing, which was made before round 1; put it back, or "
                        "begin anew elsewhere"
                    )
        return found

    def _check_lines(self, beside: Mapping[str, Any]) -> None:
        """Refuse a file that lost or changed a line which the checkpoint counts."""
        for key, name in GROWING.items():
            lines, expected = self.path / name, beside.get(f"{key}-sha256")
            if expected is None or hashlib.sha256(_bytes(lines)[: beside[key]]).hexdigest() == expected:
                continue
            read_lines(lines)  # names a line that cannot be read
            raise ConfigError(
                f"{lines}: is damaged, a line is missing or changed; put it back, or begin anew elsewhere"
            )


def _bytes(file: Path) -> bytes:
    """What is in a file; nothing where there is none."""
    return file.read_bytes() if file.exists() else b""


def _text(file: Path) -> str:
    """One line; bytes that are no text are none of it."""
    return file.read_text(errors="replace").strip()
