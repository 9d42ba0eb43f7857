"""Low-rank adapters: a layer's weights W stay what they are, and a product of two thin matrices beside them is trained.

LoRA (Hu et al., ICLR 2022, section 4): y = W x + B A x with A of R rows and B of R columns. For a convolution A is one with R
outputs and the same kernel, stride and padding, and B one of 1 x 1. A begins with a normal law of variance one over its inputs, B
with zeros, so the network begins as it was. There is no factor beside B A: the learning rate is one.

Once trained, W + B A is a layer like any other (`merged`), so a model file, encryption and export know nothing of adapters. Parties
compare that file by its digest. So products are taken in float64, where that of two float32 is exact, and added in the order of
the rows: every machine rounds alike.
"""

from __future__ import annotations

import copy
import hashlib
import math
from typing import NoReturn

import torch
from torch import nn

from mpc_fl.errors import ModelError

Adaptable = nn.Linear | nn.Conv2d


class AdaptedLayer(nn.Module):
    """`frozen(x) + up(down(x))` for a linear layer, (N, ..., I) to (N, ..., O), or a convolution, (N, I, H, W) to (N, O, H', W').

    `down` is A, drawn from `generator`, and `up` is B, zeros; both float32 and without bias.
    """

    def __init__(self, frozen: Adaptable, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.frozen = frozen
        self.down: Adaptable
        self.up: Adaptable
        if isinstance(frozen, nn.Linear):
            self.down = nn.Linear(frozen.in_features, rank, bias=False)
            self.up = nn.Linear(rank, frozen.out_features, bias=False)
        else:
            shape = {name: getattr(frozen, name) for name in ("kernel_size", "stride", "padding", "dilation")}
            self.down = nn.Conv2d(frozen.in_channels, rank, bias=False, padding_mode=frozen.padding_mode, **shape)
            self.up = nn.Conv2d(rank, frozen.out_channels, 1, bias=False)
        with torch.no_grad():
            self.down.weight.normal_(0.0, 1 / math.sqrt(self.down.weight[0].numel()), generator=generator)
            self.up.weight.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's value with the adapter's."""
        return self.frozen(x) + self.up(self.down(x))

    @property
    def weight(self) -> NoReturn:
        """Raises `ModelError`: a network that reads its weights itself would pass the adapter over."""
        raise ModelError(
            "the network reads the weights of a layer itself, so no adapter can stand beside them",
            "set training.trainable to head, bias, last:N or all",
        )


def takes_adapter(layer: nn.Module, rank: int) -> bool:
    """Whether a layer is linear or a convolution over all channels, and an adapter smaller than its weights.

    Layers of derived classes are left alone: attention reads their weights itself.
    """
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or type(layer) not in (nn.Linear, nn.Conv2d):
        return False
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return False
    outputs, inputs = len(layer.weight), layer.weight[0].numel()
    return rank * (outputs + inputs) < outputs * inputs


def adapt(model: nn.Module, paths: list[str], rank: int, seed: int) -> None:
    """Put adapters of that rank beside the layers at these paths, in place. A is drawn in their order from the public `seed`."""
    # Not the stream that the weights themselves were drawn from.
    digest = hashlib.blake2b(f"adapters {seed}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    with torch.random.fork_rng(devices=[]):  # what the constructors draw is overwritten
        for path in paths:
            layer = model.get_submodule(path)
            assert isinstance(layer, (nn.Linear, nn.Conv2d))  # `takes_adapter`
            model.set_submodule(path, AdaptedLayer(layer, rank, generator).train(layer.training))


@torch.no_grad()
def _merged_weight(adapted: AdaptedLayer) -> torch.Tensor:
    """W + B A as float32, of the shape of W: bit for bit the same on every machine."""
    weight, down = adapted.frozen.weight.double(), adapted.down.weight.double()
    columns = adapted.up.weight.double().reshape(len(weight), -1).T
    for column, row in zip(columns, down, strict=True):
        weight = weight + column.reshape(-1, *[1] * row.dim()) * row
    return weight.float()


def merged(model: nn.Module) -> nn.Module:
    """The network with every adapter taken into the weights it stands beside: a copy, or the network itself without any."""
    if not any(isinstance(layer, AdaptedLayer) for layer in model.modules()):
        return model
    plain = copy.deepcopy(model)
    for path, layer in list(plain.named_modules()):
        if isinstance(layer, AdaptedLayer):
            with torch.no_grad():
                layer.frozen.weight.copy_(_merged_weight(layer))
            plain.set_submodule(path, layer.frozen)
    return plain
