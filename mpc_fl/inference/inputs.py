"""What goes into a diagnosis: images as the model takes them, and those that a model owner finds ranges with.

Who brings images to a diagnosis is `learning.data`'s; this module only adds what both parties must agree on.

The model owner says what inputs are normalised with, and how fine they are in the engine `fast`. Both are held against the
public range of inputs before an image is touched, and images are then cut off at that range without a word: whether a session
goes on must not depend on an image, or a model owner could choose constants that ask about it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import DataError, ProtocolError
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.normalisation import Normalisation, range_of_inputs
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.calibration import CALIBRATION, Calibration
from mpc_fl.links.links import Links
from mpc_fl.roles import MODEL_OWNER

_CALIBRATION_IMAGES = 64
# No normalised input is larger: deviations are at least 1/64 of the range (`federation.feature_statistics`), which makes 64 of
# it, and whoever brings constants of another origin has 16 times more.
_LARGEST_INPUT = 1024.0


@dataclass(frozen=True)
class ModelInputs:
    """The hospital's records as the model takes them. No input exceeds `largest` in magnitude, which public values say."""

    records: Dataset
    largest: float


def as_the_model_takes_them(config: Config, images: Dataset, links: Links) -> ModelInputs:
    """The hospital's images, normalised with the constants that the model owner tells where inputs are normalised.

    Raises `ProtocolError` for constants that no data of the configured range can have, before images are touched.
    """
    low, high = range_of_inputs(config)
    constants = None if config.data.normalise == "none" else _constants(config, links)
    largest = max(abs(low), abs(high)) if constants is None else _largest_normalised(low, high, constants)
    if not largest <= _LARGEST_INPUT:  # false for NaN
        raise ProtocolError(
            f"the model owner normalises inputs so that they could exceed {_LARGEST_INPUT:g}",
            "ask it for a model whose inputs were normalised by training here; nothing was sent of any image",
        )
    records = images
    if config.data.features is not None:
        from mpc_fl.learning.models.feature_extractor import as_records  # torchvision: nobody else needs it

        pixels = images.inputs.nan_to_num(nan=0.0).clamp(0.0, 1.0)
        records = as_records(replace(images, inputs=pixels), config)
    inputs = records.inputs.nan_to_num(nan=low).clamp(low, high)
    return ModelInputs(normalised(replace(records, inputs=inputs), constants), largest)


def calibration_of_model(config: Config, links: Links) -> Calibration | None:
    """At the hospital: what the model owner's logits are calibrated with, where logits are opened and the model has it.

    Raises `ProtocolError` for what cannot be a calibration, before an image is asked about.
    """
    if config.evaluation.calibrate == "none" or config.reveal != "logits":
        return None
    values = links.receive_tensor(MODEL_OWNER, CALIBRATION, torch.float64, (1 + len(config.data.classes),))
    try:
        return Calibration.of_tensor(values)
    except DataError as error:
        raise ProtocolError(f"the model owner sent {error.what}", "ask it for its model file") from None


def send_calibration(config: Config, links: Links, hospital: str, calibration: Calibration | None) -> None:
    """The model owner's side of `calibration_of_model`: no secret of the model, like the normalisation of its inputs."""
    if calibration is not None and config.reveal == "logits":
        links.send_tensor(hospital, CALIBRATION, calibration.tensor())


def _constants(config: Config, links: Links) -> Normalisation:
    shape = (2, config.data.input_shape[0])
    try:
        values = links.receive_tensor(MODEL_OWNER, "normalisation", torch.float64, shape)
        return Normalisation.of_tensor(values, config)
    except DataError as error:
        raise ProtocolError(
            f"the model owner's constants cannot be: {error.what}", "ask it for its model file"
        ) from None


def _largest_normalised(low: float, high: float, constants: Normalisation) -> float:
    pairs = zip(constants.mean, constants.deviation, strict=True)
    return max(max(abs(low - mean), abs(high - mean)) / deviation for mean, deviation in pairs)


def calibration_images(config: Config) -> torch.Tensor:
    """What the model owner finds ranges with: its own records (site.images) if it names some, else public phantoms.

    Ranges hold four times the largest value seen, but phantoms are no patients: a model owner should name records like
    those it will be asked about. Raises `DataError` when there are none.
    """
    if config.site.images is not None or config.data.is_table:
        from mpc_fl.learning.data.loading import load_images  # readers of files: a hospital of this module needs none

        images = load_images(config.site.images, config, _CALIBRATION_IMAGES).inputs
    else:
        images = public_phantoms(_CALIBRATION_IMAGES, config)
    if config.data.features is None:
        return images
    from mpc_fl.learning.models.feature_extractor import extractor_of

    extractor = extractor_of(config)
    assert extractor is not None
    return extractor.records(images)
