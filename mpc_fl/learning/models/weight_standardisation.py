"""Weight standardisation: a convolution is trained through filters of mean 0 and norm 1 (Qiao et al., 2019).

Each filter w, all weights of one output channel, stands for (w - mean w) / |w - mean w|, which is what standardising and
dividing by the square root of the number of weights gives (Brock, De and Smith, ICLR 2021). De et al. (2022) found it to help
under differential privacy. It mixes no patients: it looks at weights alone.

It is a matter of training. `plain_network` puts the filters themselves in place of w, so model files, encrypted diagnosis and
whoever reads a file have an ordinary network.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from mpc_fl.errors import ModelError

_SMALLEST_SQUARE = 1e-4  # of |w - mean w|: a filter of equal weights stays at zero
_TOLERANCE = 1e-3


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose `weight` stands for its standardised filters."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(inputs, standardised(self.weight), self.bias)


def standardised(weight: torch.Tensor) -> torch.Tensor:
    """Filters of mean 0 and norm 1 from weights float32 (channels, ...), of the same shape."""
    rows = weight.flatten(1)
    centred = rows - rows.mean(dim=1, keepdim=True)
    squares = centred.square().sum(dim=1, keepdim=True)
    return (centred * squares.clamp(min=_SMALLEST_SQUARE).rsqrt()).view_as(weight)


def with_weight_standardisation(model: nn.Module) -> nn.Module:
    """Replace every Conv2d by one that is trained through standardised filters, in place, and return the network.

    Names, order and values of parameters stay. Filters of a single weight, which would be nothing without their mean, stay as they
    are. Raises `ModelError` for a network without convolutions.
    """
    found = [(path, layer) for path, layer in model.named_modules() if _may_be_standardised(layer)]
    if not found:
        raise ModelError("the network has no convolutions", "set model.weight_standardisation to false")
    for path, layer in found:
        model.set_submodule(path, _converted(layer, StandardisedConv2d))
    return model


def require_standardised(model: nn.Module, drawn: Sequence[str] = ()) -> None:
    """Initial weights that were not trained this way would mean something else. Raises `ModelError`.

    `drawn` names parameters that are not of these weights.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, StandardisedConv2d) and f"{path}.weight" not in drawn:
            weight = layer.weight.detach()
            if not torch.allclose(standardised(weight), weight, rtol=_TOLERANCE, atol=_TOLERANCE):
                raise ModelError(
                    f"the initial weights of {path} are not standardised", "set model.weight_standardisation to false"
                )


def plain_network(model: nn.Module) -> nn.Module:
    """A copy in which standardised filters are ordinary weights; the network itself where it has none.

    Outputs agree up to rounding. All parties must write the same file: single sums, products, quotients and roots of float64
    numbers are rounded alike on every machine, and here nothing else is computed.
    """
    if not any(isinstance(layer, StandardisedConv2d) for layer in model.modules()):
        return model
    plain = copy.deepcopy(model)
    for path, layer in list(plain.named_modules()):
        if isinstance(layer, StandardisedConv2d):
            folded = _converted(layer, nn.Conv2d)
            with torch.no_grad():
                folded.weight.copy_(_standardised_alike(layer.weight.detach()))
            plain.set_submodule(path, folded)
    return plain


def _may_be_standardised(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.weight[0].numel() > 1


def _converted(layer: nn.Module, kind: type[nn.Conv2d]) -> nn.Conv2d:
    """The same convolution with the same parameters, as one of another kind."""
    assert isinstance(layer, nn.Conv2d)
    converted = kind.__new__(kind)
    nn.Module.__init__(converted)
    converted.__dict__.update(layer.__dict__)
    return converted


def _standardised_alike(weight: torch.Tensor) -> torch.Tensor:
    """`standardised`, by operations on single float64 numbers."""
    rows = weight.double().flatten(1)
    centred = rows - _sums(rows) / rows.shape[1]
    squares = _sums(centred * centred)
    return (centred / squares.clamp(min=_SMALLEST_SQUARE).sqrt()).float().view_as(weight)


def _sums(rows: torch.Tensor) -> torch.Tensor:
    """Sums of rows (channels, columns) as (channels, 1), added in pairs."""
    while (columns := rows.shape[1]) > 1:
        half = columns // 2
        rows = torch.cat([rows[:, :half] + rows[:, half : 2 * half], rows[:, 2 * half :]], dim=1)
    return rows
