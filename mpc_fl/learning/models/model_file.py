"""Model files: safetensors with a description of the architecture. Nothing is unpickled.

A model that was trained on normalised inputs (`data.normalise: secure`) says so in its description, with the public
constants: whoever has an image applies them before the network or before sharing the image. The network itself stays
as it was, so encryption costs nothing more, and zero padding stays exact, which it would not if they were folded in.
A model that was calibrated on validation patients says so, too: `calibration` is applied to its logits.
One that was trained on films says how they became its inputs (`films`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import DataError, ModelError
from mpc_fl.files import written_whole
from mpc_fl.learning.data.normalisation import CONSTANTS, Normalisation
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.calibration import CALIBRATION, Calibration
from mpc_fl.learning.models.films import FILMS, describe_films, require_same_films, unknown_films
from mpc_fl.learning.models.low_rank import merged
from mpc_fl.learning.models.weight_standardisation import plain_network
from mpc_fl.parsing import parse_json

_FORMAT = "mpc-fl model 1"
_RETRAIN = "give a model.safetensors written by mpc-fl train"
_KEY = "mpc-fl"  # one entry: safetensors writes several in no fixed order, and equal models shall be equal files


def describe(
    config: Config, normalisation: Normalisation | None = None, calibration: Calibration | None = None
) -> dict[str, Any]:
    """What a model file says about its network and, if it has them, the constants of its inputs and its calibration."""
    constants: dict[str, Any] = {}
    if calibration is not None:
        constants[CALIBRATION] = calibration.to_json()
    if normalisation is not None:
        constants[CONSTANTS] = normalisation.to_json()
    if config.data.features is not None:  # what inputs are made with; files of other models stay as they were
        constants["features"] = config.data.features.described()
    if films := describe_films(config):
        constants[FILMS] = films
    return {
        **constants,
        "format": _FORMAT,
        "architecture": config.model.architecture,
        "normalisation": config.model.normalisation,
        "classes": list(config.data.classes),
        "input_shape": list(config.data.input_shape),
    }


def model_file(
    model: nn.Module,
    config: Config,
    normalisation: Normalisation | None = None,
    calibration: Calibration | None = None,
) -> bytes:
    """The content of a model file: all parameters and buffers with the description of the architecture.

    Adapters (`low_rank`) are taken into the weights they stand beside, and standardised weights are folded: the file is that of
    an ordinary network.
    `normalisation` is that of the inputs it was trained on, needed where `data.normalise` is not none, and only there; so is
    `calibration` where `evaluation.calibrate` is not none.
    """
    if (calibration is not None) != (config.evaluation.calibrate != "none"):
        raise ModelError("the model has another calibration than evaluation.calibrate says", "pass it on")
    if (normalisation is not None) != (config.data.normalise != "none"):
        raise ModelError("the model has another normalisation of inputs than data.normalise says", "pass it on")
    state = plain_network(merged(model)).state_dict()
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    return save(tensors, metadata={_KEY: json.dumps(describe(config, normalisation, calibration))})


def save_model(
    path: Path,
    model: nn.Module,
    config: Config,
    normalisation: Normalisation | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Write a model file whole or not at all; see `model_file`."""
    with written_whole(path) as temporary:
        temporary.write_bytes(model_file(model, config, normalisation, calibration))


def load_model(path: Path, config: Config) -> nn.Module:
    """Read a model file into the configured architecture, in evaluation mode.

    Raises `ModelError` when the file is missing, cannot be read, is corrupt, of another architecture, input shape or
    number of classes or normalisation of inputs, was trained on films of another form (`films`), or holds tensors of another
    type, NaN or infinite weights. Its inputs are to be normalised as `load_normalisation` says.
    """
    description, tensors = _read_described(path)
    retrain, expected = _RETRAIN, describe(config)
    for key in ("classes", "architecture", "normalisation", "input_shape", "features"):
        if description.get(key) != expected.get(key):
            found, wanted = _shown(key, description.get(key)), _shown(key, expected.get(key))
            raise ModelError(
                f"model file {path} has {found}, the configuration {wanted}",
                "use the configuration the model was trained with",
            )
    require_same_films(description, path, config)
    _normalisation_of(description, path, config)
    _calibration_of(description, path, config)
    model = build_model(config)
    forms = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
    if forms != {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}:
        raise ModelError(f"the tensors in model file {path} do not fit the architecture", retrain)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"model file {path} holds NaN or infinite weights in '{name}'", retrain)
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def note_on_films(path: Path, config: Config) -> str | None:
    """A sentence where nothing says how films became the inputs of this model; None where it is known. Raises `ModelError`."""
    return unknown_films(_read_described(path)[0], path, config)


def load_normalisation(path: Path, config: Config) -> Normalisation | None:
    """What the inputs of this model file are normalised with; `None` for nothing, as configured.

    Raises `ModelError` when the file cannot be read, has constants that cannot be, or none where `data.normalise` wants
    them, or the other way round.
    """
    return _normalisation_of(_read_described(path)[0], path, config)


def _normalisation_of(description: dict[str, Any], path: Path, config: Config) -> Normalisation | None:
    constants = description.get(CONSTANTS)
    if (constants is not None) != (config.data.normalise != "none"):
        found = "no" if constants is None else "a"
        raise ModelError(
            f"model file {path} has {found} normalisation of inputs, data.normalise is '{config.data.normalise}'",
            "use the configuration the model was trained with",
        )
    if constants is None:
        return None
    try:
        normalisation = Normalisation.from_json(constants, config.data.features is not None)
    except DataError:
        raise ModelError(f"model file {path} has a normalisation of inputs that cannot be", _RETRAIN) from None
    if len(normalisation.mean) != config.data.input_shape[0]:
        raise ModelError(f"model file {path} normalises inputs of another shape", _RETRAIN)
    return normalisation


def load_calibration(path: Path, config: Config) -> Calibration | None:
    """The calibration in this model file; `None` where `evaluation.calibrate` is none.

    Raises `ModelError` when the file cannot be read, has a calibration that cannot be, or none where one is configured, or the
    other way round.
    """
    return _calibration_of(_read_described(path)[0], path, config)


def _calibration_of(description: dict[str, Any], path: Path, config: Config) -> Calibration | None:
    values, configured = description.get(CALIBRATION), config.evaluation.calibrate
    if (values is not None) != (configured != "none"):
        raise ModelError(
            f"model file {path} has {'no' if values is None else 'a'} calibration, evaluation.calibrate is '{configured}'",
            "use the configuration the model was trained with",
        )
    if values is None:
        return None
    try:
        calibration = Calibration.from_json(values)
    except DataError:
        raise ModelError(f"model file {path} has a calibration that cannot be", _RETRAIN) from None
    if len(calibration.offsets) != len(config.data.classes):
        raise ModelError(f"model file {path} has a calibration of other classes", _RETRAIN)
    return calibration


def _read_described(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    description, tensors = _read(path, _RETRAIN)
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ModelError(f"model file {path} does not describe an mpc-fl model", _RETRAIN)
    return description, tensors


def _read(path: Path, fix: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Description and tensors of a model file."""
    try:
        path.open("rb").close()  # safetensors does not say why it cannot open a file
        with safe_open(path, framework="pt") as file:
            description = parse_json((file.metadata() or {}).get(_KEY, "{}"))
            return description, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
    except FileNotFoundError:
        raise ModelError(f"model file {path} does not exist", fix) from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ModelError(f"cannot read model file {path}: {error.strerror}", fix) from None
    except (SafetensorError, OSError, ValueError):
        raise ModelError(f"model file {path} is corrupt or no safetensors file", fix) from None


def _shown(key: str, value: Any) -> str:
    """An entry of a description for an error, on one line and short: a file may hold anything."""
    text = json.dumps(value)
    text = text if len(text) <= 80 else f"{text[:80]}..."
    if key == "classes" and isinstance(value, list):
        return f"{len(value)} classes {text}"
    return f"{key.replace('_', ' ')} {text}"
