"""What goes into a diagnosis: images as the model takes them, and those that a model owner finds ranges with.

Who brings images to a diagnosis is `learning.data`'s; this module only adds what both parties must agree on.
"""

from __future__ import annotations

import torch

from mpc_fl.config.config import Config
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.links.links import Links
from mpc_fl.roles import MODEL_OWNER

_CALIBRATION_IMAGES = 64


def as_the_model_takes_them(config: Config, images: Dataset, links: Links) -> Dataset:
    """The hospital's images, normalised with the constants that the model owner tells where inputs are normalised."""
    if config.data.normalise == "none":
        return images
    shape = (2, config.data.input_shape[0])
    constants = links.receive_tensor(MODEL_OWNER, "normalisation", torch.float64, shape)
    return normalised(images, Normalisation.of_tensor(constants))


def calibration_images(config: Config) -> torch.Tensor:
    """What the model owner finds ranges with: its own records (site.images) if it names some, else public phantoms.

    Ranges hold four times the largest value seen, but phantoms are no patients: a model owner should name records like
    those it will be asked about. Raises `DataError` when there are none.
    """
    if config.site.images is not None or config.data.is_table:
        from mpc_fl.learning.data.loading import load_images  # readers of files: a hospital of this module needs none

        return load_images(config.site.images, config, _CALIBRATION_IMAGES).inputs
    return public_phantoms(_CALIBRATION_IMAGES, config)
