"""Where networks are computed at this site: on its CPU or on a GPU, in float32 or, for gradients, with bfloat16 inside.

Records and logits stay on the CPU: `OnDevice` carries one to the device and the other back, so whoever calls a network need not
know where it is. What follows a gradient stays on the CPU as well: rounding to a grid, noise, steps, shares, masks. They use the
stream cipher and exact sums, which are shown to be right there.

It is each site's own matter (`site.device`): no other party can tell, and no result has to agree bit for bit with another
site's. On a GPU the same input gives the same bits on the same machine: algorithms are deterministic, kernels are never chosen
by trial, and products are not rounded to TF32. An operation without such an algorithm ends the run with one line. What distributed
noise needs besides is in `training.independent_records`.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.metering import on_gpu

Precision = Literal["float32", "bfloat16"]
_NO_REPEATABLE_KERNEL = "does not have a deterministic implementation"


@dataclass(frozen=True)
class Device:
    """A device of this machine, and the precision in which gradients are computed there."""

    place: torch.device
    precision: Precision = "float32"

    @property
    def exact(self) -> Device:
        """The same device in float32: for features and evaluation."""
        return replace(self, precision="float32")

    @property
    def words(self) -> str:
        """The device for a user: its name, and the precision of gradients."""
        name = f" ({torch.cuda.get_device_name(self.place)})" if self.place.type == "cuda" else ""
        return f"{self.place}{name}, gradients in {self.precision}"


CPU = Device(torch.device("cpu"))


def device_of(config: Config) -> Device:
    """The device that `site.device` names, made ready. Raises `ConfigError` where this machine or its torch has none such."""
    wanted, available = config.site.device, torch.cuda.is_available()
    if wanted == "auto":
        wanted = "cuda" if available else "cpu"
    if wanted == "cpu":
        return Device(CPU.place, config.site.precision)
    if not available:
        why = "torch finds no GPU" if torch.backends.cuda.is_built() else "torch was installed without CUDA"
        raise ConfigError(
            f"site.device is {wanted}, and {why}", "set site.device to cpu or auto, or mend the driver or torch"
        )
    place = torch.device("cuda", int(wanted.removeprefix("cuda").removeprefix(":") or 0))
    if place.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ConfigError(f"site.device is {wanted}, and the last GPU here is cuda:{last}", "name one that is there")
    _compute_repeatably(config.privacy.mechanism == "distributed")
    return Device(place, config.site.precision)


def _compute_repeatably(distributed: bool) -> None:
    """Have this process, a party of its own, compute on GPUs as the head of this module says."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is used first
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if (
        distributed
    ):  # it takes another kernel when memory is short: then not shapes alone decide (`independent_records`)
        torch.backends.cudnn.enabled = False


@contextlib.contextmanager
def at_work(device: Device) -> Iterator[None]:
    """Where the block computes on a GPU, count its time as that of the GPU (`metering.on_gpu`).

    A network `OnDevice` does so itself; a step does for the gradients that follow it.
    """
    if device.place.type != "cuda":
        yield
        return
    with on_gpu(lambda: torch.cuda.synchronize(device.place)):
        yield


class OnDevice(nn.Module):
    """A network on a device: takes records from the CPU, gives float32 logits or features (N, ...) on the CPU.

    Its parameters are `network`'s, in the same order. In bfloat16 the products within are computed by autocast; parameters, and
    so gradients, are float32, and so is what BatchNorm computes.
    """

    def __init__(self, network: nn.Module, device: Device) -> None:
        super().__init__()
        self.network, self.device = network, device

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits or features of `inputs`, float32 (N, ...)."""
        with at_work(self.device):
            carried = inputs.to(self.device.place)
            if self.device.precision == "float32":
                return self.network(carried).cpu()
            with torch.autocast(self.device.place.type, torch.bfloat16, cache_enabled=False):
                return self.network(carried).float().cpu()


def on_device(network: nn.Module, device: Device) -> nn.Module:
    """A network that computes on `device`: itself on the CPU in float32, else in `OnDevice`, on a GPU as a copy.

    Call it once for many steps; `follow` keeps a copy's parameters up with those of `network`.
    """
    if device == CPU:
        return network
    # On the CPU a copy of the structure alone: parameters and buffers are the network's own.
    kept = [*network.parameters(), *network.buffers()] if device.place == CPU.place else []
    own = copy.deepcopy(network, {id(tensor): tensor for tensor in kept}).to(device.place)
    if device.precision != "float32":
        for layer in own.modules():
            if isinstance(layer, _BatchNorm):  # not every kernel takes activations and statistics of two types
                layer.register_forward_pre_hook(lambda _layer, inputs: tuple(each.float() for each in inputs))
    return OnDevice(own, device).train(network.training)


@torch.no_grad()
def follow(computed: nn.Module, network: nn.Module) -> None:
    """Give a copy that `on_device` made of `network` the parameters that this has now."""
    if not isinstance(computed, OnDevice):
        return
    for own, parameter in zip(computed.network.parameters(), network.parameters(), strict=True):
        if own is not parameter:
            own.copy_(parameter)


def gradients_of(computed: nn.Module, network: nn.Module) -> None:
    """Bring the `.grad` of a copy that `on_device` made to the parameters of `network`, and clear it there."""
    if not isinstance(computed, OnDevice):
        return
    for own, parameter in zip(computed.network.parameters(), network.parameters(), strict=True):
        if own is parameter:
            continue
        parameter.grad = None if own.grad is None else own.grad.to(parameter.device)
        own.grad = None


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Tell in one line where a network has no algorithm on this device that gives the same bits again. Raises `ModelError`."""
    try:
        yield
    except RuntimeError as error:
        if _NO_REPEATABLE_KERNEL not in str(error):
            raise
        what = str(error).split()[0][:60]
        raise ModelError(
            f"the network cannot be trained repeatably on a GPU: {what}", "set site.device to cpu"
        ) from None
