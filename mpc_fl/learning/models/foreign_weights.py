"""Weights that others trained, from their files into our networks. Nothing is unpickled but what torch allows for weights.

A file is a safetensors file or a torch checkpoint, read with `weights_only`; the tensors may lie under "state_dict" or "model".
Names are those of the network here (torchvision's, and timm's where they are the same), perhaps behind `module.`, `model.` or
`backbone.`, or for EfficientNet-Lite0 the published ones. What a file holds is bounded and checked before it is used: it
may come from anybody.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from mpc_fl.errors import ModelError, printable
from mpc_fl.learning.models.efficientnet_lite import EfficientNetLite0, from_published
from mpc_fl.learning.models.parameters import layers_with_parameters

LARGEST_FILE = 2 << 30  # bytes, of a file and of the tensors in it
_KINDS = "give a safetensors file or a torch checkpoint that holds a state_dict"
_NESTS = ("state_dict", "model")
_PREFIXES = ("module.", "model.", "backbone.")
_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"  # of BatchNorm: it says how long a network was trained, and is not used
# torchvision's files of DenseNet are older than its names: `denselayer1.norm.1` is `denselayer1.norm1`.
_OLD_DENSENET = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.(?=[12]\.)", re.ASCII)
_SHOWN = 3  # names in an error
# All that torch's reader raises for bytes that are no checkpoint, as fuzzing found, and what is built on it.
_UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile),
)


@dataclass(frozen=True)
class Fitted:
    """`replaced` names the tensors of the last layer that keep their initial values, because the file's are for another
    number of classes or it has none; `loaded` counts the others."""

    loaded: int
    replaced: tuple[str, ...]


def read_bounded(path: Path, largest: int = LARGEST_FILE) -> bytes:
    """The content of a weights file. Raises `ModelError` when it is missing, cannot be read or is larger than `largest`."""
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except FileNotFoundError:
        raise ModelError(f"weights file {path} does not exist", "check the path") from None
    except OSError as error:
        raise ModelError(f"cannot read weights file {path}: {error.strerror}", "check the path") from None
    if len(content) > largest:
        raise ModelError(f"weights file {path} is larger than {largest >> 20} MiB", _KINDS)
    return content


def digest_of(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, floating ones as float32. Raises `ModelError`."""
    return weights_in(read_bounded(path), f"weights file {path}")


def weights_in(content: bytes, where: str) -> dict[str, torch.Tensor]:
    """The same from the content of a file; `where` names it in errors."""
    try:
        if content[8:9] == b"{":  # after the length of a safetensors header
            found: Any = load_safetensors(content)
        else:
            found = _checkpoint(content, where)
    except ModelError:
        raise
    except (SafetensorError, *_UNREADABLE):
        raise ModelError(f"{where} is damaged, or holds more than tensors", _KINDS) from None
    for _ in _NESTS:
        inner = [found[key] for key in _NESTS if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)]
        found = inner[0] if inner else found
    if not isinstance(found, Mapping) or not found:
        raise ModelError(f"{where} holds no tensors by name", _KINDS)
    strangers = [name for name, value in found.items() if not _is_plain(name, value)]
    if strangers:
        raise ModelError(f"{where} holds what is no plain tensor: {_some(map(str, strangers))}", _KINDS)
    # A view may repeat few stored numbers many times.
    if sum(tensor.numel() for tensor in found.values()) > LARGEST_FILE // 4:
        raise ModelError(f"{where} holds tensors of more than {LARGEST_FILE >> 20} MiB", _KINDS)
    return {name: _converted(tensor) for name, tensor in found.items()}


def _checkpoint(content: bytes, where: str) -> Any:
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST_FILE:
                raise ModelError(f"{where} unpacks to more than {LARGEST_FILE >> 20} MiB", _KINDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of versions of pickle: what matters is whether it can be read
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _is_plain(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and type(value) in (torch.Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def _converted(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.detach()
    return (values.float() if values.is_floating_point() else values).contiguous()


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(f"'{printable(name, 80)}'" for name in listed[:_SHOWN]) + more


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names in the `state_dict` of the last layer with parameters, which gives the logits."""
    return tuple(
        f"{path}.{name}" if path else name
        for path, layer in layers_with_parameters(model)[-1:]
        for name, _ in layer.named_parameters(recurse=False)
    )


def own_names(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names, and with the borders, that `model` has for them; counters of batches are left out.

    What the network has no name for keeps its own. Raises `ModelError` when two tensors would get one name.
    """
    own = model.state_dict().keys()
    prefixes = tuple(prefix for prefix in _PREFIXES if not any(name.startswith(prefix) for name in own))
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        while prefix := next((prefix for prefix in prefixes if short.startswith(prefix)), ""):
            short = short.removeprefix(prefix)
        short = _OLD_DENSENET.sub(r"\1", short)
        if short in found:
            raise ModelError(f"the weights hold {_some([short])} twice, behind several prefixes", _KINDS)
        if short.rpartition(".")[2] != _COUNTER:
            found[short] = tensor
    if isinstance(model, EfficientNetLite0) and not found.keys() & own:
        return from_published(found)
    return found


def fit_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Fitted:
    """Load tensors as `read_weights` gives them into a network, in place.

    The last layer keeps its initial values where the tensors are for another number of classes, or hold none for it. Raises
    `ModelError`, and changes nothing then, when anything else is missing, left over or of another shape, or when values are
    not finite or no variances.
    """
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if not name.endswith(_COUNTER)}
    given = own_names(model, tensors)
    head = head_names(model)
    other_classes = all(name not in given or _is_of_other_classes(given[name], own[name]) for name in head)
    replaced = head if other_classes else ()
    wanted = [name for name in own if name not in replaced]
    # Tables of whole numbers that the architecture gives (positions, say) may be missing.
    missing = [name for name in wanted if name not in given and own[name].is_floating_point()]
    surplus = [name for name in given if name not in own]
    shapes = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != own[name].shape
    ]
    faults = {"missing": missing, "left over": surplus, "of another shape": shapes}
    if any(faults.values()):
        said = "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names)
        fix = "give weights of this model.architecture"
        if not missing and not shapes and all(name.endswith(_STATISTICS) for name in surplus):
            fix = "set model.normalisation=frozen, which keeps the statistics of BatchNorm"
        raise ModelError(f"the weights do not fit {type(model).__name__} ({said})", fix)
    loaded = {name: given[name] for name in wanted if name in given}
    _require_usable(loaded, own)
    with torch.no_grad():
        for name, tensor in loaded.items():
            own[name].copy_(tensor)
    return Fitted(len(loaded), replaced)


def _is_of_other_classes(given: torch.Tensor, own: torch.Tensor) -> bool:
    return given.dim() == own.dim() and given.shape[1:] == own.shape[1:] and given.shape[0] != own.shape[0]


def _require_usable(given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Values that a network can compute with. Raises `ModelError`."""
    for name, tensor in given.items():
        if not own[name].is_floating_point():
            if not torch.equal(tensor.to(own[name].dtype), own[name]):
                raise ModelError(f"the weights have another table {_some([name])} than the network", _KINDS)
        elif not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the weights have values in {_some([name])} that are not finite numbers", _KINDS)
        elif name.endswith("running_var") and bool((tensor < 0).any()):
            raise ModelError(f"the weights have variances below zero in {_some([name])}", _KINDS)
