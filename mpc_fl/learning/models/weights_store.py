"""Initial weights of this machine, kept by content: the name of a file is the SHA-256 of all that is in it.

A configuration that starts from weights of others names them by that digest, so all parties start from the same ones, whoever
brought the file. Equal tensors from an equal origin give equal bytes. Every read compares the content with the name.

A model that this program trained is kept as it is, so its name is the SHA-256 that all parties of its training signed.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save

from mpc_fl.errors import ModelError, printable
from mpc_fl.files import written_whole
from mpc_fl.learning.models.foreign_weights import digest_of, read_bounded
from mpc_fl.parsing import parse_json

_FORMAT, _MODEL_FORMAT = "mpc-fl weights 1", "mpc-fl model 1"
_KEY = "mpc-fl"  # one entry: safetensors writes several in no fixed order
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LONGEST = 1000  # letters and entries of a description that are shown
_OBTAIN = (
    "run mpc-fl model import or mpc-fl model fetch here, as for this configuration elsewhere; for a model of an earlier run get "
    "its model.safetensors and import that, or give it with --from"
)


def directory() -> Path:
    """`$XDG_CACHE_HOME/mpc-fl/weights`, by default in ~/.cache. Raises `ModelError` for a user without a home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # so the specification has it
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            raise ModelError("this user has no home directory for weights", "set XDG_CACHE_HOME") from None
    return cache / "mpc-fl" / "weights"


def stored_bytes(
    tensors: Mapping[str, torch.Tensor], architecture: str, origin: str, details: Mapping[str, Any] | None = None
) -> bytes:
    """The content of a stored file: float32 tensors under the network's own names, and what they are."""
    description = {**(details or {}), "format": _FORMAT, "architecture": architecture, "origin": origin}
    plain = {name: tensors[name].detach().contiguous().clone() for name in sorted(tensors)}
    return save(plain, metadata={_KEY: json.dumps(description, sort_keys=True)})


def store(
    tensors: Mapping[str, torch.Tensor], architecture: str, origin: str, details: Mapping[str, Any] | None = None
) -> str:
    """Keep weights in `directory()` and return their digest. `origin` says where they come from, the same at every site.

    `details` are what else is known, as JSON, under the names that `model_file.describe` has for it: `input_shape`,
    `normalisation_of_inputs`; and `classes`, a number here. Raises `MpcFlError` when the file cannot be written.
    """
    content = stored_bytes(tensors, architecture, origin, details)
    digest = digest_of(content)
    with written_whole(_place_in(directory(), digest)) as temporary:
        temporary.write_bytes(content)
    return digest


def model_digest(path: Path) -> str:
    """The SHA-256 of a model file of this program, as its parties signed it. Raises `ModelError` for any other file."""
    return digest_of(_model_content(path))


def _model_content(path: Path) -> bytes:
    content = read_bounded(path)
    if not is_model(described(content, path)[1]):
        raise ModelError(f"{path} is no model of mpc-fl", "give a model.safetensors; mpc-fl model import keeps others")
    return content


def store_model(path: Path, place: Path | None = None) -> str:
    """Keep a model file of this program, byte for byte, and return its SHA-256. Raises `ModelError` for any other file.

    It goes to `directory()`, or to the site's own directory `place`.
    """
    content = _model_content(path)
    digest, folder = digest_of(content), directory() if place is None else place
    if place is not None and not place.is_dir():
        raise ModelError(f"site.weights is the file {place}", f"set it to a folder, in which {digest[:12]} can be kept")
    if not _place_in(folder, digest).exists():
        with written_whole(_place_in(folder, digest)) as temporary:
            temporary.write_bytes(content)
    return digest


def is_model(description: Mapping[str, Any]) -> bool:
    """Whether a stored file is a model that this program trained, by its description."""
    return description.get("format") == _MODEL_FORMAT


def is_digest(text: str) -> bool:
    """Whether this can be the name of stored weights."""
    return _DIGEST.fullmatch(text) is not None


def find(digest: str, place: Path | None) -> Path:
    """The file of these weights: in `directory()`, in the site's own directory `place`, or the file `place`.

    Raises `ModelError` when it is not there, cannot be read, has another content or is no file that `store` wrote.
    """
    load(digest, place)
    return _path(digest, place)


def load(digest: str, place: Path | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and description of stored weights; see `find`.

    The description has `architecture` and, unless it is of a model (`is_model`), `origin`, both text, and perhaps what `store`
    calls details, unchecked.
    """
    path = _path(digest, place)
    tensors, description = described(_content(path, digest), path)
    keys = ("architecture",) if is_model(description) else ("architecture", "origin")
    known = description.get("format") in (_FORMAT, _MODEL_FORMAT)
    if not known or not all(isinstance(description.get(key), str) for key in keys):
        raise ModelError(f"{path} holds no weights that mpc-fl stored", _OBTAIN)
    return tensors, description


def describe_file(path: Path) -> dict[str, Any]:
    """What a file that this program wrote says it is, how many parameters it has, and its SHA-256. Raises `ModelError`."""
    content = read_bounded(path)
    tensors, description = described(content, path)
    statistics = ("running_mean", "running_var")
    parameters = sum(
        tensor.numel()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not name.endswith(statistics)
    )
    said = _bounded(description)
    return {**said, "parameters": parameters, "sha256": digest_of(content)}


def _bounded(value: Any, depth: int = 4) -> Any:
    """An entry of a description without what could disturb a terminal or a reader: a file may hold anything."""
    if isinstance(value, (dict, list)) and not depth:
        return "..."
    if isinstance(value, dict):
        listed = list(value.items())[:_LONGEST]
        return {printable(key, _LONGEST): _bounded(each, depth - 1) for key, each in listed}
    if isinstance(value, list):
        return [_bounded(each, depth - 1) for each in value[:_LONGEST]]
    return printable(value, _LONGEST) if isinstance(value, str) else value


def described(content: bytes, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and description of any file that this program writes: a model, or stored weights. Raises `ModelError`."""
    try:
        tensors = load_safetensors(content)
        (size,) = struct.unpack_from("<Q", content)
        header = parse_json(content[8 : 8 + size])
        description = parse_json(header["__metadata__"][_KEY])
    except (SafetensorError, struct.error, ValueError, LookupError, TypeError, RecursionError):
        raise ModelError(
            f"{path} is damaged, or no file of mpc-fl", "give a model.safetensors, or stored weights"
        ) from None
    if not isinstance(description, dict) or not str(description.get("format")).startswith("mpc-fl "):
        raise ModelError(f"{path} does not say what it holds", "give a model.safetensors, or stored weights")
    return tensors, description


def _path(digest: str, place: Path | None) -> Path:
    if not is_digest(digest):
        raise ModelError(
            "initial weights are named by a SHA-256, 64 digits 0-9 and a-f", "mpc-fl model import prints it"
        )
    whole = directory() if place is None else place
    path = whole if place is not None and not place.is_dir() else _place_in(whole, digest)
    if not path.exists():
        raise ModelError(f"the initial weights {digest} are not at {path}", _OBTAIN)
    return path


def _place_in(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.safetensors"


def _content(path: Path, digest: str) -> bytes:
    content = read_bounded(path)
    found = digest_of(content)
    if found != digest:
        raise ModelError(
            f"{path} is damaged or holds other weights: its SHA-256 is {found}, not {digest}",
            f"remove it and {_OBTAIN}",
        )
    return content
