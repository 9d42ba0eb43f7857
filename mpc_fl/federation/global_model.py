"""The global model between rounds: its first weights, and the frozen statistics of BatchNorm that go with any weights.

Weights come from the run's seed. Statistics are measured on public synthetic images, which costs no patient's privacy, or
(FedBN without differential privacy) by each hospital on its own.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import DataError, ModelError
from mpc_fl.learning.data.normalisation import CONSTANTS, Normalisation
from mpc_fl.learning.data.phantoms import public_phantoms
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.class_offsets import last_layer
from mpc_fl.learning.models.earlier_model import load_initial_weights
from mpc_fl.learning.models.own_networks import is_own_network, said_of_network
from mpc_fl.learning.models.trainable import set_trainable
from mpc_fl.learning.models.weight_standardisation import require_standardised, with_weight_standardisation
from mpc_fl.learning.models.weights_store import load

log = logging.getLogger(__name__)

CALIBRATION_IMAGES = 64
_CALIBRATION_RECORDS = 256


def initial_model(config: Config) -> nn.Module:
    """The first global model, with the parameters trainable that shall be.

    Weights from the seed and frozen statistics calibrated on public synthetic images, or both from `model.initial_weights`.
    Raises `ModelError` where these are not at hand or do not fit.
    """
    model = build_model(config)
    if config.model.weight_standardisation:
        with_weight_standardisation(model)
    if config.model.initial_weights is None:
        calibrate_on_public_images(model, config, None)
    else:
        fitted = load_initial_weights(model, config)
        require_standardised(model, fitted.replaced)
        if fitted.replaced:
            log.info("not of the initial weights, but from the seed: %s", ", ".join(fitted.replaced))
    if config.evaluation.calibrate in ("offsets", "both"):
        last_layer(model)  # now, not when a model is trained that cannot be served
    return set_trainable(model, config.training.trainable, config.seed)


def code_of(config: Config) -> str:
    """Which network of others a party trains, as parties say it at the hand-shake; empty for those of this program.

    Raises `ConfigError` for a package that is not there or not allowed here, `ModelError` for a function that gives no network.
    """
    return said_of_network(config, build_model(config)) if is_own_network(config) else ""


def normalisation_of_weights(config: Config) -> Normalisation | None:
    """How inputs are scaled for the initial weights, where `data.normalise` says so; else None.

    Raises `ModelError` for weights that do not say it, or say it of other inputs.
    """
    if config.data.normalise != "weights":
        return None
    assert config.model.initial_weights is not None  # `Config` saw to it
    _, description = load(config.model.initial_weights, config.site.weights)
    try:
        constants = Normalisation.from_json(description.get(CONSTANTS), to_norm_1=config.data.features is not None)
    except DataError:
        constants = None
    scaled = config.data.input_shape[0]
    if constants is None or len(constants.mean) != scaled:
        what = f"{scaled} {'channels' if len(config.data.input_shape) == 3 else 'features'}"
        raise ModelError(
            f"the weights {config.model.initial_weights[:12]} do not say how {what} are scaled",
            "set data.normalise to none or secure",
        )
    return constants


def calibrate_on_public_images(model: nn.Module, config: Config, normalisation: Normalisation | None) -> None:
    """Frozen BatchNorm statistics from public synthetic images, brought to the inputs' normalisation if there is one.

    Those that came with initial weights stay as they are.
    """
    if config.model.initial_weights is not None:
        return
    images_are_records = not config.data.is_table and config.data.features is None
    if config.model.normalisation == "frozen" and images_are_records:
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
