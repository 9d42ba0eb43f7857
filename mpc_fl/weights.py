"""Model files: safetensors with a description of the architecture. Nothing is unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from mpc_fl.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.files import written_whole
from mpc_fl.models import build_model

_FORMAT = "mpc-fl model 1"
_KEY = "mpc-fl"  # one entry: safetensors writes several in no fixed order, and equal models shall be equal files


def describe(config: Config) -> dict[str, Any]:
    """What a model file says about its network."""
    return {
        "format": _FORMAT,
        "architecture": config.model.architecture,
        "normalisation": config.model.normalisation,
        "classes": list(config.data.classes),
        "input_shape": list(config.data.input_shape),
    }


def model_file(model: nn.Module, config: Config) -> bytes:
    """The content of a model file: all parameters and buffers with the description of the architecture."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    return save(tensors, metadata={_KEY: json.dumps(describe(config))})


def save_model(path: Path, model: nn.Module, config: Config) -> None:
    """Write a model file whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_bytes(model_file(model, config))


def load_model(path: Path, config: Config) -> nn.Module:
    """Read a model file into the configured architecture, in evaluation mode.

    Raises `ModelError` when the file is missing, cannot be read, is corrupt, of another architecture, input shape or
    number of classes, or holds tensors of another type, NaN or infinite weights.
    """
    retrain = "give a model.safetensors written by mpc-fl train"
    description, tensors = _read(path, retrain)
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ModelError(f"model file {path} does not describe an mpc-fl model", retrain)
    expected = describe(config)
    for key in ("classes", "architecture", "normalisation", "input_shape"):
        if description.get(key) != expected[key]:
            found, wanted = _shown(key, description.get(key)), _shown(key, expected[key])
            raise ModelError(
                f"model file {path} has {found}, the configuration {wanted}",
                "use the configuration the model was trained with",
            )
    model = build_model(config, config.data.input_shape, config.seed)
    forms = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
    if forms != {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}:
        raise ModelError(f"the tensors in model file {path} do not fit the architecture", retrain)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"model file {path} holds NaN or infinite weights in '{name}'", retrain)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _read(path: Path, fix: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Description and tensors of a model file."""
    try:
        path.open("rb").close()  # safetensors does not say why it cannot open a file
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            return description, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except FileNotFoundError:
        raise ModelError(f"model file {path} does not exist", fix) from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ModelError(f"cannot read model file {path}: {error.strerror}", fix) from None
    except (SafetensorError, OSError, ValueError, RecursionError):
        raise ModelError(f"model file {path} is corrupt or no safetensors file", fix) from None


def _shown(key: str, value: Any) -> str:
    """An entry of a description for an error, on one line and short: a file may hold anything."""
    text = json.dumps(value)
    text = text if len(text) <= 80 else f"{text[:80]}..."
    if key == "classes" and isinstance(value, list):
        return f"{len(value)} classes {text}"
    return f"{key.replace('_', ' ')} {text}"


def flatten_buffers(model: nn.Module) -> torch.Tensor:
    """All floating-point buffers (frozen normalisation statistics) in one float32 vector."""
    pieces = [buffer.reshape(-1).float() for buffer in model.buffers() if buffer.is_floating_point()]
    return torch.cat(pieces) if pieces else torch.zeros(0)


def load_flat_buffers(model: nn.Module, flat: torch.Tensor) -> None:
    """Inverse of `flatten_buffers`; the caller has checked the length."""
    start = 0
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(flat[start : start + buffer.numel()].reshape(buffer.shape))
            start += buffer.numel()
