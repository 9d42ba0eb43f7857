"""Checkpoints: what a party needs to go on after it was killed, written whole after every round.

A party keeps those of its last two rounds: a hospital writes its own before it signs a round, the aggregator after all
have signed, so that whatever round the aggregator goes on from, every hospital that took part in it has its state too.
A checkpoint holds opened values, public ones, and at a hospital what never leaves it anyway (its own normalisation
layers, its privacy accountant). Seeds and masks are never in it: a process that starts again makes them anew.

A file holds the SHA-256 of its tensors and facts. That finds damage, not somebody who computes it again: the parameters of the
global model are therefore held against the digest that all parties signed for the round (`audit_trail`). Of what is not what it
should be the checkpoint before it is taken; where all are damaged the run stops.

A file also holds the settings of its run. A run that gets more rounds goes on from it, also one that was finished
(`config.continuing` says what may change beside); whatever else has changed is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.config.config import Config
from mpc_fl.config.continuing import require_same_run
from mpc_fl.errors import MpcFlError
from mpc_fl.files import written_whole
from mpc_fl.parsing import parse_json

log = logging.getLogger(__name__)

_FORMAT = "mpc-fl checkpoint 3"
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")
_KEPT = 2
_ANEW = "remove the directory and start the run anew"


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round`: tensors, and `facts`, which JSON can hold.

    `settings` are those the run had when it was written (`Config.settings_of_run`), set when it is read.
    """

    round: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)


class _DamagedError(MpcFlError):
    """A checkpoint that is not what was written; one before it may be."""


def checkpoint_name(number: int) -> str:
    """The name of the file with the state after round `number`."""
    return f"checkpoint-{number}.safetensors"


def save_checkpoint(directory: Path, checkpoint: Checkpoint, config: Config) -> None:
    """Write a checkpoint of a run of `config` whole or not at all, then remove those before the last two."""
    settings = config.settings_of_run()
    facts = {"format": _FORMAT, "round": checkpoint.round, "settings": settings, "facts": dict(checkpoint.facts)}
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    said = {**facts, "sha256": _sha256(facts, tensors)}
    with written_whole(directory / checkpoint_name(checkpoint.round)) as temporary:
        temporary.write_bytes(save(tensors, metadata={"mpc-fl": json.dumps(said)}))
    for path, number in _checkpoints(directory):
        if number <= checkpoint.round - _KEPT or number > checkpoint.round:
            with contextlib.suppress(OSError):
                path.unlink()


def keep_last_checkpoint(directory: Path) -> None:
    """Remove all checkpoints but the last one: what a run that is complete needs to be given more rounds."""
    for path, _ in sorted(_checkpoints(directory), key=lambda item: item[1])[:-1]:
        path.unlink()


def load_checkpoint(
    directory: Path, config: Config, number: int | None = None, check: Callable[[Checkpoint], str | None] | None = None
) -> Checkpoint | None:
    """The checkpoint of round `number`, by default the last one that is whole; `None` when there is none.

    `check` says what is wrong with one beside, if anything. One that is damaged, or that `check` refuses, is passed over with a
    warning. Raises `MpcFlError` when none is left, and for a file of another version, `ConfigError` for one of a run that
    cannot go on with `config`.
    """
    found = [(path, known) for path, known in _checkpoints(directory) if number is None or known == number]
    last: MpcFlError | None = None
    for path, known in sorted(found, key=lambda item: item[1], reverse=True):
        try:
            checkpoint = _read(path, known, config)
            wrong = None if check is None else check(checkpoint)
            if wrong is None:
                return checkpoint
            last = last or MpcFlError(f"the checkpoint {path} {wrong}", _ANEW)
        except _DamagedError as error:
            last = last or error
        log.warning("%s is not what was written after round %d; the one before it is looked for", path, known)
    if last is not None:
        raise last
    return None


def _read(path: Path, number: int, config: Config) -> Checkpoint:
    """A checkpoint that is whole. Raises `_DamagedError`, or `MpcFlError` for another version or configuration."""
    try:
        with safe_open(path, framework="pt") as file:
            said = parse_json((file.metadata() or {}).get("mpc-fl", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except (SafetensorError, OSError, ValueError):
        raise _DamagedError(f"the checkpoint {path} is damaged", _ANEW) from None
    if not isinstance(said, dict) or said.get("format") != _FORMAT:
        raise MpcFlError(f"the checkpoint {path} is of another version", _ANEW)
    facts = {name: value for name, value in said.items() if name != "sha256"}
    if said.get("sha256") != _sha256(facts, tensors) or facts.get("round") != number:
        raise _DamagedError(f"the checkpoint {path} is damaged", _ANEW)
    if not isinstance(facts.get("facts"), dict) or not isinstance(facts.get("settings"), dict):
        raise _DamagedError(f"the checkpoint {path} is damaged", _ANEW)
    require_same_run(facts["settings"], config, f"the run of the checkpoint {path}")
    return Checkpoint(number, tensors, facts["facts"], facts["settings"])


def _sha256(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Of all that a checkpoint holds: facts, and names, types, shapes and bytes of tensors."""
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps([dict(facts), digests], sort_keys=True).encode()).hexdigest()


def _checkpoints(directory: Path) -> list[tuple[Path, int]]:
    if not directory.is_dir():
        return []
    found = [(path, _NAME.fullmatch(path.name)) for path in directory.iterdir()]
    return [(path, int(match.group(1))) for path, match in found if match]
