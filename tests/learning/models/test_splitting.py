"""A network in two parts is the network, and whatever cannot be cut so stays whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mpc_fl.config.config import parse_config
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.parameters import flatten_parameters, trainable_parameters
from mpc_fl.learning.models.splitting import split_before_trained
from mpc_fl.learning.models.trainable import set_trainable


class Branching(nn.Module):
    """A head in which something of the inputs has a part besides."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.head, self.kind = nn.Linear(6, 6), nn.Linear(6, 3), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.first(x).relu_()
        if self.kind == "values":
            return self.head(features) if float(features.sum()) > 0 else self.head(-features)
        if self.kind == "inputs":
            return self.head(features) + x[:, :3]
        if self.kind == "features":
            return self.head(features) + features[:, :3]
        return self.head(features.add_(1.0)).mul_(2.0)


@pytest.mark.parametrize("architecture", ["small_cnn", "mlp", "resnet18"])
@pytest.mark.parametrize("which", ["head", "last:2"])
def test_both_parts_together_are_the_network(architecture: str, which: str) -> None:
    config = parse_config(
        {"data": {"image_size": 32, "channels": 3}, "model": {"architecture": architecture, "hidden": [7]}}, "test"
    )
    model = set_trainable(build_model(config, seed=1), which).eval()
    inputs = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    calibrate_batchnorm(model, inputs)
    parts = split_before_trained(model)
    if architecture == "mlp" and which == "last:2":
        assert parts is None or not list(parts[0].parameters())  # its first layer is trained
        return
    assert parts is not None
    front, rest = parts
    torch.testing.assert_close(rest(front(inputs)), model(inputs), rtol=0, atol=1e-5)
    assert [name for name, _ in trainable_parameters(rest)] == [name for name, _ in trainable_parameters(model)]
    assert torch.equal(flatten_parameters(rest), flatten_parameters(model))
    assert not trainable_parameters(front) and not front.training and not rest.training


@pytest.mark.parametrize("kind", ["features", "in place"])
def test_what_the_rest_reads_is_what_the_network_reads(kind: str) -> None:
    model = set_trainable(Branching(kind), "head")
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    before = inputs.clone()
    parts = split_before_trained(model)
    assert parts is not None
    value = parts[0](inputs)
    kept = value.clone()
    torch.testing.assert_close(parts[1](value), model(inputs.clone()), rtol=0, atol=1e-6)
    assert torch.equal(inputs, before) and torch.equal(value, kept)


@pytest.mark.parametrize("kind", ["values", "inputs"])
def test_a_network_that_cannot_be_cut_stays_whole(kind: str) -> None:
    assert split_before_trained(set_trainable(Branching(kind), "head")) is None


def test_nothing_before_the_head_is_no_cut_and_neither_is_a_weight_of_both_parts() -> None:
    assert split_before_trained(nn.Linear(6, 3)) is None
    assert split_before_trained(set_trainable(nn.Sequential(nn.Linear(6, 3)), "head")) is None
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    assert split_before_trained(set_trainable(tied, "head")) is None


def test_the_network_itself_stays_as_it_is() -> None:
    model = set_trainable(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), "head").train()
    before = copy.deepcopy(model.state_dict())
    assert split_before_trained(model) is not None
    assert model.training and model[1].inplace
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
