"""Gradients layer by layer are those of one backward pass a record, and what is not known is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.learning.device import Device, on_device
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm, freeze_normalisation, with_group_norm
from mpc_fl.learning.models.parameters import trainable_parameters
from mpc_fl.learning.models.trainable import set_trainable
from mpc_fl.learning.training.layer_gradients import by_layers
from mpc_fl.learning.training.per_sample_gradients import clipped_sum, sum_cross_entropy, working_copy

torch.set_num_threads(1)


def unusual() -> nn.Sequential:
    """Convolutions with strides, gaps, groups and offsets, with BatchNorm behind some of them."""
    return nn.Sequential(
        nn.Conv2d(2, 6, (3, 5), stride=(2, 1), padding=(1, 2)),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3, bias=False),
        nn.BatchNorm2d(6, affine=False),
        nn.Tanh(),
        nn.Conv2d(6, 12, 3, padding=1, groups=6),
        nn.Flatten(),
        nn.Linear(12 * 6 * 12, 7),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    )


class _Residual(nn.Module):
    """What goes into a layer is read elsewhere, too, and what comes out of BatchNorm is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = torch.relu_(self.norm(self.first(x)))
        after = self.second_norm(self.second(before))
        after += before
        return self.last(torch.relu(after).mean(dim=(2, 3)))


def batch(count: int, copies: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, copies, *shape, generator=generator).double(), torch.arange(count) % 3


def spread(network: nn.Module) -> nn.Module:
    """With BatchNorm of which no number is 0 or 1, in float64."""
    for number, layer in enumerate(network.modules()):
        if isinstance(layer, nn.BatchNorm2d):
            waves = torch.sin(torch.arange(layer.num_features) + float(number))
            layer.running_mean, layer.running_var = 0.3 * waves, 1.5 + waves
            if layer.weight is not None:
                layer.weight.data, layer.bias.data = 1 - 0.5 * waves, 0.2 * waves
    return network.double().eval()


def one_by_one(network: nn.Module, copies: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """The specification: a backward pass of plain torch for each record."""
    parameters = [parameter for _, parameter in trainable_parameters(network)]
    rows = [
        torch.autograd.grad(sum_cross_entropy(network(record), label.expand(len(record))), parameters)
        for record, label in zip(copies, labels, strict=True)
    ]
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]


def small_network() -> nn.Module:
    return build_model(Config(), input_shape=(1, 32, 32), seed=0)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("which", ["unusual", "small", "residual", "head", "bias"])
def test_gradients_are_those_of_a_backward_pass_for_each_record(which: str, copies: int) -> None:
    if which == "unusual":
        network, shape = spread(freeze_normalisation(unusual())), (2, 12, 12)
    elif which == "residual":
        network, shape = spread(freeze_normalisation(_Residual())), (2, 8, 8)
    else:
        network, shape = spread(small_network()), (1, 32, 32)
        if which != "small":
            set_trainable(network, which)
    working, (records, labels) = working_copy(network), batch(3, copies, *shape)
    chunks = list(by_layers(working, sum_cross_entropy, records, labels))
    found = [torch.cat(parts) for parts in zip(*(gradients for gradients, _ in chunks), strict=True)]
    expected = one_by_one(network, records, labels)
    named = [name for name, _ in trainable_parameters(network)]
    assert len(found) == len(expected) == len(named)
    for name, own, other in zip(named, found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    losses = [
        sum_cross_entropy(network(record), label.expand(copies)) for record, label in zip(records, labels, strict=True)
    ]
    torch.testing.assert_close(torch.cat([values for _, values in chunks]), torch.stack(losses).detach())


def test_clipped_sums_of_many_records_are_those_of_the_loop() -> None:
    """More records than go at once. In float64: rounding puts some activations on the other side of a kink."""
    network = small_network().double()
    records = torch.randn(150, 1, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    calibrate_batchnorm(network, records)
    working, labels = working_copy(network), torch.arange(150) % 3
    layers, loop = (
        torch.cat(
            [part.reshape(-1) for part in clipped_sum(working, sum_cross_entropy, records, labels, 0.1, by).gradients]
        )
        for by in ("layers", "loop")
    )
    assert float((layers - loop).norm()) < 1e-9 * float(loop.norm())


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def _normalised_first() -> nn.Module:
    return freeze_normalisation(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.Flatten()))


REFUSED = {
    "a layer called twice": (_Twice(), (4,)),
    "a parameter beside layers": (_Scaled(), (4,)),
    "a parameter of two layers": (_Tied(), (4,)),
    "BatchNorm behind nothing": (_normalised_first(), (2, 3, 3)),
    "GroupNorm": (with_group_norm(unusual()), (2, 12, 12)),
    "other padding": (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten()), (2, 3, 3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_in_one_line(name: str) -> None:
    network, shape = REFUSED[name]
    with pytest.raises(ModelError, match="layer by layer.*per_sample_gradients"):
        list(by_layers(working_copy(network), sum_cross_entropy, torch.ones(2, 1, *shape), torch.tensor([0, 1])))


def test_other_precisions_are_refused() -> None:
    computed = on_device(working_copy(small_network()), Device(torch.device("cpu"), "bfloat16"))
    with pytest.raises(ModelError, match="float32"):
        list(by_layers(computed, sum_cross_entropy, torch.ones(1, 1, 1, 32, 32), torch.tensor([0])))
