"""The global model between rounds: its first weights, and the frozen statistics of BatchNorm that go with any weights.

Weights come from the run's seed. Statistics are measured on public synthetic images, which costs no patient's privacy, or
(FedBN without differential privacy) by each hospital on its own.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm

CALIBRATION_IMAGES = 64
_CALIBRATION_RECORDS = 256


def initial_model(config: Config) -> nn.Module:
    """The first global model: weights from the seed, frozen statistics calibrated on public synthetic images."""
    model = build_model(config)
    calibrate_on_public_images(model, config, None)
    return model


def calibrate_on_public_images(model: nn.Module, config: Config, normalisation: Normalisation | None) -> None:
    """Frozen BatchNorm statistics from public synthetic images, brought to the inputs' normalisation if there is one."""
    if config.model.normalisation == "frozen" and not config.data.is_table:
        images = public_phantoms(CALIBRATION_IMAGES, config)
        calibrate_batchnorm(model, images if normalisation is None else normalisation.apply(images))


def calibrate_own(model: nn.Module, inputs: torch.Tensor, config: Config) -> None:
    """Measure frozen BatchNorm statistics on a hospital's own training inputs, float32 (N, ...), where FedBN does.

    That is with `training.local_normalisation` and without differential privacy; else nothing happens. To be called
    whenever the shared parameters have changed, before evaluation and training: the statistics belong to the weights.
    256 inputs are used, evenly from all of them, which may be ordered by class.
    """
    if not config.training.local_normalisation or config.privacy.mechanism != "none":
        return
    if config.model.normalisation == "frozen" and len(inputs) >= 2:
        calibrate_batchnorm(model, inputs[:: math.ceil(len(inputs) / _CALIBRATION_RECORDS)])
