"""A new run that begins with a model of an earlier one: what has to fit, what is taken over, and what begins anew.

The model file is kept as it is in the store of weights, under its own SHA-256, the one that all parties of its training signed. A
configuration names it as `model.initial_weights`, so that all parties of the new run agree on it, and each needs the file.

Taken over: all parameters, and the frozen statistics of normalisation layers. The last layer begins anew where the classes are
others, by number or by name. How inputs are scaled is taken over with `data.normalise: weights`, which costs no privacy, or
measured anew with `secure`, which is charged; a model that was trained on scaled inputs is refused with `none`. A model on
features of images goes on with the same features alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError, printable
from mpc_fl.learning.data.normalisation import CONSTANTS
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.foreign_weights import Fitted, fit_weights, head_names
from mpc_fl.learning.models.weights_store import is_model, load

_SHOWN = 80


def load_initial_weights(model: nn.Module, config: Config) -> Fitted:
    """Load `model.initial_weights` into a network, in place: weights of others, or an earlier model of this program.

    Raises `ModelError` where they are not on this machine, or do not fit the network or the configuration.
    """
    assert config.model.initial_weights is not None
    tensors, description = load(config.model.initial_weights, config.site.weights)
    return fit_weights(model, _fitting(model, tensors, description, config) if is_model(description) else tensors)


def begun_anew(config: Config) -> tuple[str, ...]:
    """Names of the tensors that do not come from the earlier model. Raises `ModelError` where it does not fit."""
    return load_initial_weights(build_model(config), config).replaced


def _fitting(
    model: nn.Module, tensors: dict[str, torch.Tensor], said: Mapping[str, Any], config: Config
) -> dict[str, torch.Tensor]:
    """The tensors of an earlier model that a run of `config` takes over. Raises `ModelError` where it does not fit."""
    assert config.model.initial_weights is not None
    which = f"the model {config.model.initial_weights[:12]}"
    features = None if config.data.features is None else config.data.features.model_dump(mode="json")
    for setting, key, wanted in (
        ("model.architecture", "architecture", config.model.architecture),
        ("model.normalisation", "normalisation", config.model.normalisation),
        ("data.features", "features", features),
    ):
        if said.get(key) != wanted:
            found, own = (printable(str(value), _SHOWN) for value in (said.get(key), wanted))
            raise ModelError(f"{which} was trained with {setting} {found}, not {own}", f"set {setting} to what it was")
    if said.get(CONSTANTS) is not None and config.data.normalise == "none":
        raise ModelError(
            f"{which} was trained on scaled inputs",
            "set data.normalise to weights, which takes their scale over, or to secure, which measures it anew",
        )
    if said.get("classes") == list(config.data.classes):
        return tensors
    head = head_names(model)
    return {name: tensor for name, tensor in tensors.items() if name not in head}
