"""Networks of others: a function of an installed package, named `package.module:function` as `model.architecture`.

    def network(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module

`input_shape` is one record, (channels, height, width) or (features,). The network takes float32 (N, *input_shape) and returns
float32 logits (N, classes). What is checked whenever it is built: all that; that its parameters are float32, finite and on the
CPU; and that it is the same again from the same seed, so that it draws its weights from torch alone, which is seeded. BatchNorm is
replaced as in all networks (`batch_norm`). Parties say to each other at the hand-shake which package and version they have, and the
digest of the names and shapes of the network's state (`said_of_network`): with others than the peer's a run does not begin.

Importing a package runs its code, so each site allows it by name first (`installed_code`).
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from mpc_fl import compatibility
from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.installed_code import is_reference, load_function, package_of

_SIGNATURE = "it is to be: def network(input_shape, classes) -> torch.nn.Module"
_DIGITS = 12  # of a digest, in what parties say and in errors


def is_own_network(config: Config) -> bool:
    """Whether the configured network is a function of an installed package."""
    return is_reference(config.model.architecture)


def build(config: Config, input_shape: tuple[int, ...], seed: int) -> nn.Module:
    """The network with weights drawn from `seed`, checked. Raises `ConfigError` for a package that is not there or not allowed
    here, `ModelError` for a function that gives no network."""
    reference = config.model.architecture
    compatibility.prepare()  # packages of networks import torchvision
    function, package = load_function(reference, config.site.allow_packages)
    return _checked(function, input_shape, len(config.data.classes), seed, f"{reference} ({package})")


def _checked(function: Any, input_shape: tuple[int, ...], classes: int, seed: int, what: str) -> nn.Module:
    network, again = (_built(function, input_shape, classes, seed, what) for _ in range(2))
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ModelError(f"{what} has no parameters to train", _SIGNATURE)
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        if value.device.type != "cpu" or (value.is_floating_point() and value.dtype != torch.float32):
            raise ModelError(f"{what} has '{name}' of {value.dtype} on {value.device}", "make it float32, on the CPU")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"{what} has values in '{name}' that are not finite", "ask its author")
    state, other = network.state_dict(), again.state_dict()
    if forms_of(network) != forms_of(again) or not all(torch.equal(state[name], other[name]) for name in state):
        raise ModelError(
            f"{what} gives other weights when it is called again with the same seed",
            "let it draw weights with torch alone, and read nothing that changes",
        )
    network.eval()
    with torch.no_grad():
        logits = _called(network, what, "its network", torch.zeros(2, *input_shape))
    if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes) or logits.dtype != torch.float32:
        gave = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ModelError(
            f"{what} gives {gave} of 2 records, not logits float32 (2, {classes})",
            "return the logits of each record alone",
        )
    return network


def _built(function: Any, input_shape: tuple[int, ...], classes: int, seed: int, what: str) -> nn.Module:
    """One network, drawn from the seed whichever generator its author takes; those of this process stay as they were."""
    kept, kept_by_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            network = _called(function, what, "it", tuple(input_shape), classes)
    finally:
        random.setstate(kept)
        np.random.set_state(kept_by_numpy)
    if not isinstance(network, nn.Module):
        raise ModelError(f"{what} gives {type(network).__name__}, which is no network", _SIGNATURE)
    return network


def _called(function: Any, what: str, subject: str, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001 - code of others
        first = (str(error).splitlines() or [""])[0][:120]
        raise ModelError(f"{what}: {subject} raised {type(error).__name__}: {first}", _SIGNATURE) from None


def forms_of(network: nn.Module) -> str:
    """SHA-256 of names, types and shapes of a network's state, in order, as hex."""
    forms = [[name, str(value.dtype), list(value.shape)] for name, value in network.state_dict().items()]
    return hashlib.sha256(json.dumps(forms).encode()).hexdigest()


def said_of_network(config: Config, network: nn.Module) -> str:
    """What parties that train a network of others say of it to each other; empty for networks of this program."""
    if not is_own_network(config):
        return ""
    return f"{package_of(config.model.architecture)}, state {forms_of(network)[:_DIGITS]}"
