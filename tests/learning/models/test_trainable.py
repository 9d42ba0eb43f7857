"""Which parameters are trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpc_fl.errors import ModelError
from mpc_fl.learning.models.parameters import trainable_parameters
from mpc_fl.learning.models.trainable import set_trainable


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, bias=False), nn.Linear(4, 3)
    )


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("all", ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias"]),
        ("head", ["4.weight", "4.bias"]),
        ("bias", ["0.bias", "1.bias", "4.weight", "4.bias"]),
        ("last:2", ["3.weight", "4.weight", "4.bias"]),
        ("last:3", ["1.weight", "1.bias", "3.weight", "4.weight", "4.bias"]),
    ],
)
def test_these_are_trained(which: str, names: list[str]) -> None:
    assert [name for name, _ in trainable_parameters(set_trainable(network(), which))] == names


def test_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ModelError, match="has 4 layers with parameters, not 5"):
        set_trainable(network(), "last:5")


def test_what_is_not_trained_has_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    set_trainable(model, "head")(torch.ones(1, 3)).sum().backward()
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False]
