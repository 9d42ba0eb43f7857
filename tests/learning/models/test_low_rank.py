"""Adapters of low rank: a network begins as it was, and with them taken into its weights it is a plain one of the same values."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.federation.global_model import initial_model
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.low_rank import AdaptedLayer, adapt, merged, takes_adapter
from mpc_fl.learning.models.model_file import load_model, save_model
from mpc_fl.learning.models.parameters import shared_coordinates, trainable_parameters
from mpc_fl.learning.models.trainable import set_trainable


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = (
        *(nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 9, 1), nn.Flatten()),
        *(nn.Linear(144, 8), nn.Linear(8, 3)),
    )
    return nn.Sequential(*layers).eval()


def trained(model: nn.Module) -> nn.Module:
    """The network after steps of any kind."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def test_adapters_stand_beside_the_layers_that_are_larger_and_the_head_is_trained() -> None:
    model = set_trainable(network(), "lora:2")
    assert [path for path, layer in model.named_modules() if isinstance(layer, AdaptedLayer)] == ["0", "4", "6"]
    assert [(name, tuple(parameter.shape)) for name, parameter in trainable_parameters(model)] == [
        ("0.down.weight", (2, 2, 3, 3)),
        ("0.up.weight", (6, 2, 1, 1)),
        ("4.down.weight", (2, 6, 1, 1)),
        ("4.up.weight", (9, 2, 1, 1)),
        ("6.down.weight", (2, 144)),
        ("6.up.weight", (8, 2)),
        ("7.weight", (3, 8)),
        ("7.bias", (3,)),
    ]


def test_a_network_begins_as_it_was_and_its_adapters_follow_from_the_seed() -> None:
    inputs, plain = torch.randn(4, 2, 8, 8), network()
    adapted, again, other = (set_trainable(copy.deepcopy(plain), "lora:3", seed) for seed in (5, 5, 6))
    assert torch.equal(adapted(inputs), plain(inputs))
    state, same, differs = (dict(trainable_parameters(model)) for model in (adapted, again, other))
    assert all(torch.equal(value, same[name]) for name, value in state.items())
    for name, value in state.items():
        if name.endswith("up.weight"):
            assert not bool(value.any())
        if name.endswith("down.weight"):
            assert not torch.equal(value, differs[name])
    down = state["6.down.weight"].detach()  # 432 values of deviation 1 / 12: the estimate errs by 3 %
    assert 0.85 / 12 < float(down.std()) < 1.15 / 12


def test_the_process_keeps_its_random_state() -> None:
    model, before = network(), torch.random.get_rng_state()
    set_trainable(model, "lora:1", 3)
    assert torch.equal(torch.random.get_rng_state(), before)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2]),
    st.sampled_from(["zeros", "reflect"]),
    st.booleans(),
)
def test_merged_is_the_same_function_without_adapters(
    rank: int, kernel: int, stride: int, padding_mode: str, bias: bool
) -> None:
    torch.manual_seed(rank)
    first = nn.Conv2d(3, 7, kernel, stride, kernel // 2, bias=bias, padding_mode=padding_mode)
    plain = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28, 5, bias=bias))
    names = list(plain.state_dict())
    adapt(plain, ["0", "4"], rank, 0)
    for layer in (plain[0], plain[4]):
        nn.init.normal_(layer.up.weight)
    inputs, before = torch.randn(2, 3, 9, 9), {name: value.clone() for name, value in plain.state_dict().items()}
    model = merged(plain)
    assert list(model.state_dict()) == names and type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())  # it was a copy


def test_merging_rounds_once_and_in_one_order() -> None:
    """The file is compared by its digest between machines whose kernels differ."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 2))
    adapt(model, ["0"], 3, 0)
    nn.init.normal_(model[0].up.weight)
    weight, up, down = (part.weight.detach().numpy() for part in (model[0].frozen, model[0].up, model[0].down))
    for row in range(5):
        for column in range(6):
            total = float(weight[row, column])
            for rank in range(3):
                total += float(up[row, rank]) * float(down[rank, column])
            assert np.float32(total) == merged(model)[0].weight[row, column].item()


def test_a_network_without_adapters_is_its_own() -> None:
    model = network()
    assert merged(model) is model


def test_derived_layers_and_those_of_single_channels_take_none() -> None:
    class Own(nn.Linear):
        pass

    assert takes_adapter(nn.Linear(20, 20), 4)
    assert not takes_adapter(Own(20, 20), 4)
    assert not takes_adapter(nn.Linear(8, 8), 4)  # as large as its adapter
    assert not takes_adapter(nn.Conv2d(32, 32, 3, groups=32), 1)
    assert not takes_adapter(nn.ConvTranspose2d(32, 32, 3), 1)


def test_attention_keeps_its_own_projections() -> None:
    """It reads their weights itself, so an adapter would be passed over."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.hidden = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)
            self.last = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.hidden(self.attention(x, x, x)[0]).mean(dim=1))

    model = set_trainable(Attending(), "lora:2")
    assert [path for path, layer in model.named_modules() if isinstance(layer, AdaptedLayer)] == ["hidden"]
    assert model(torch.zeros(1, 4, 16)).shape == (1, 3)


def test_a_network_that_reads_weights_itself_is_refused() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(20, 20), nn.Linear(20, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(nn.functional.linear(x, self.first.weight))

    with pytest.raises(ModelError, match="reads the weights of a layer itself"):
        set_trainable(Reading(), "lora:2")(torch.zeros(1, 20))


@pytest.mark.parametrize(("model", "which"), [(nn.Sequential(nn.Linear(9, 3)), "lora:1"), (network(), "lora:200")])
def test_where_no_layer_takes_an_adapter_it_is_refused(model: nn.Module, which: str) -> None:
    with pytest.raises(ModelError, match="no layer before the last one is larger than an adapter of rank"):
        set_trainable(model, which)


@pytest.mark.parametrize("which", ["lora", "lora:0", "lora:-1", "lora:1.5", "lora:1000"])
def test_ranks_that_cannot_be_are_refused(which: str) -> None:
    with pytest.raises(ConfigError, match="trainable"):
        parse_config({"training": {"trainable": which}}, "test")


def configured(**training: object) -> Config:
    return parse_config({"data": {"image_size": 16}, "training": {"trainable": "lora:2", **training}}, "test")


def test_a_model_file_holds_the_plain_network(tmp_path: object) -> None:
    config = configured()
    path = tmp_path / "model.safetensors"  # type: ignore[operator]
    model = trained(initial_model(config))
    save_model(path, model, config)
    loaded, inputs = load_model(path, config), torch.rand(3, 1, 16, 16)
    assert list(loaded.state_dict()) == list(build_model(config).state_dict())
    torch.testing.assert_close(loaded(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert float((loaded(inputs) - build_model(config)(inputs)).abs().max()) > 0.01


def test_own_normalisation_layers_are_refused_where_none_is_trained() -> None:
    model = initial_model(configured())
    with pytest.raises(ModelError, match="no normalisation layer to train"):
        shared_coordinates(model, local_normalisation=True)
