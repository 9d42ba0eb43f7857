"""Checkpoints: what a party needs to go on after it was killed, written whole after every round.

A party keeps those of its last two rounds: a hospital writes its own before it signs a round, the aggregator after all
have signed, so that whatever round the aggregator goes on from, every hospital that took part in it has its state too.
A checkpoint holds opened values, public ones, and at a hospital what never leaves it anyway (its own normalisation
layers, its privacy accountant). Seeds and masks are never in it: a process that starts again makes them anew.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mpc_fl.errors import MpcFlError
from mpc_fl.files import written_whole

_FORMAT = "mpc-fl checkpoint 1"
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round`: tensors, and `facts`, which JSON can hold."""

    round: int
    tensors: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any]


def save_checkpoint(directory: Path, checkpoint: Checkpoint, digest: str) -> None:
    """Write a checkpoint whole or not at all, then remove those before the last two. `digest` is the configuration's."""
    facts = {"format": _FORMAT, "round": checkpoint.round, "configuration": digest, "facts": dict(checkpoint.facts)}
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    with written_whole(directory / f"checkpoint-{checkpoint.round}.safetensors") as temporary:
        temporary.write_bytes(save(tensors, metadata={"mpc-fl": json.dumps(facts)}))
    for path, number in _checkpoints(directory):
        if number <= checkpoint.round - _KEPT or number > checkpoint.round:
            with contextlib.suppress(OSError):
                path.unlink()


def load_checkpoint(directory: Path, digest: str, number: int | None = None) -> Checkpoint | None:
    """The checkpoint of round `number`, by default the last one; `None` when there is none.

    Raises `MpcFlError` for a file that is damaged or of another configuration.
    """
    found = [(path, known) for path, known in _checkpoints(directory) if number is None or known == number]
    if not found:
        return None
    path, known = max(found, key=lambda item: item[1])
    fix = "remove the directory and start the run anew"
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("mpc-fl", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except (SafetensorError, OSError, ValueError, RecursionError):
        raise MpcFlError(f"the checkpoint {path} is damaged", fix) from None
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT or facts.get("round") != known:
        raise MpcFlError(f"the checkpoint {path} is of another version", fix)
    if facts.get("configuration") != digest:
        raise MpcFlError(f"the checkpoint {path} is of another configuration", "resume with the configuration it had")
    return Checkpoint(known, tensors, facts["facts"])


def _checkpoints(directory: Path) -> list[tuple[Path, int]]:
    if not directory.is_dir():
        return []
    found = [(path, _NAME.fullmatch(path.name)) for path in directory.iterdir()]
    return [(path, int(match.group(1))) for path, match in found if match]
