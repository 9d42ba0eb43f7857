"""Directories of runs as training leaves them, with a model whose weights were drawn here: one for each kind of input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mpc_fl.config.config import Config, parse_config
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.architectures import build_model, build_network
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.model_file import save_model
from mpc_fl.learning.models.weights_store import store

FITTED = Calibration(1.5, (0.0, -1.0, 0.5))
_CALIBRATED = {"data": {"validation_fraction": 0.2}, "evaluation": {"calibrate": "both"}}
_PLAIN = {"privacy": {"mechanism": "none"}}
_COLUMNS = [
    {"name": "sodium", "unit": "mmol/l", "range": [135, 145]},
    {"name": "crp", "range": [0, 200], "missing": "fill", "fill": "3.5", "censored": "half"},
    {"name": "ward", "kind": "category", "categories": ["A", "B", "C"], "missing": "indicator"},
    {"name": "fever", "kind": "boolean"},
    {"name": "born", "kind": "date", "since": "2020-01-01", "range": [-90, 0]},
]
KINDS: dict[str, dict[str, Any]] = {
    "films": {
        "data": {"source": "images", "image_size": 32, "wrong_size": "resize", "normalise": "secure"},
        "training": {"rounds": 2},
    },
    "table": {
        "data": {"source": "csv", "normalise": "secure", "table": {"columns": _COLUMNS}},
        "model": {"architecture": "mlp", "hidden": [8]},
    },
    "rows": {
        "data": {"source": "breast_cancer", "classes": ["malignant", "benign"]},
        "model": {"architecture": "linear"},
    },
    "scattering": {
        "data": {"image_size": 64, "features": {"extractor": "scattering"}, "normalise": "secure"},
        "model": {"architecture": "linear"},
    },
    "lite0": {
        "data": {"image_size": 64, "features": {"extractor": "efficientnet_lite0"}, "normalise": "secure"},
        "model": {"architecture": "linear"},
    },
}


def merged(*values: dict[str, Any]) -> dict[str, Any]:
    """Sections of all of them, later values over earlier ones."""
    found: dict[str, Any] = {}
    for each in values:
        for section, settings in each.items():
            found[section] = {**found.get(section, {}), **settings}
    return found


def configured(kind: str, calibrated: bool = False, **changes: Any) -> Config:
    """The configuration of one of `KINDS`. Public weights are drawn here and kept in this user's store."""
    values = merged(_PLAIN, KINDS[kind], _CALIBRATED if calibrated else {}, changes)
    if kind == "lite0":
        torch.manual_seed(0)
        digest = store(build_network("efficientnet_lite0", 1000).state_dict(), "efficientnet_lite0", "drawn here")
        values["data"] = {**values["data"], "features": {"extractor": "efficientnet_lite0", "weights": digest}}
    return parse_config(values, "test")


def left_by_training(directory: Path, config: Config) -> Path:
    """Write config.yaml and model.safetensors into a new directory; return the path of the model."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(config.to_yaml())
    model, draw = build_model(config), torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    channels = config.data.input_shape[0]
    of_features = config.data.features is not None
    mean = torch.linspace(-0.02, 0.02, channels).tolist() if of_features else [0.4] * channels
    deviation = [1.0 if of_features else 0.25] * channels
    scale = None if config.data.normalise == "none" else Normalisation(tuple(mean), tuple(deviation), of_features)
    calibration = None if config.evaluation.calibrate == "none" else FITTED
    save_model(directory / "model.safetensors", model, config, scale, calibration)
    return directory / "model.safetensors"
