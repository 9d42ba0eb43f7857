"""Standardised convolutions: what their filters are, that all ways to gradients know them, and that files hold plain ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.federation.global_model import initial_model
from mpc_fl.inference.fast.quantization.calibration import calibrate
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.model_file import load_model, save_model
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.models.weight_standardisation import (
    StandardisedConv2d,
    plain_network,
    require_standardised,
    standardised,
    with_weight_standardisation,
)
from mpc_fl.learning.training.per_sample_gradients import clipped_sum, sum_cross_entropy, working_copy

torch.set_num_threads(1)
CONFIG = Config().with_values(data={"image_size": 16}, model={"weight_standardisation": True})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-2, 1e3), st.floats(-10, 10))
def test_filters_have_mean_zero_and_norm_one_and_stay_so(seed: int, size: float, offset: float) -> None:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * size + offset * size
    filters = standardised(weight)
    torch.testing.assert_close(filters.mean(dim=(1, 2, 3)), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(filters.flatten(1).norm(dim=1), torch.ones(5), rtol=1e-4, atol=0)
    torch.testing.assert_close(standardised(filters), filters, rtol=0, atol=1e-5)


def test_equal_weights_stay_finite() -> None:
    weight = torch.full((2, 3, 3, 3), 0.1, requires_grad=True)
    standardised(weight).square().sum().backward()
    assert bool(torch.isfinite(standardised(weight)).all()) and bool(torch.isfinite(weight.grad).all())  # type: ignore[arg-type]


def test_names_and_numbers_of_parameters_stay() -> None:
    plain, trained = build_model(CONFIG, seed=0), initial_model(CONFIG)
    assert list(trained.state_dict()) == list(plain.state_dict())
    assert torch.equal(flatten_parameters(trained), flatten_parameters(build_model(CONFIG)))
    layers = [layer for layer in trained.modules() if isinstance(layer, nn.Conv2d)]
    assert len(layers) == 2 and all(isinstance(layer, StandardisedConv2d) for layer in layers)
    with pytest.raises(ModelError, match="no convolutions"):
        with_weight_standardisation(nn.Linear(3, 3))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_all_methods_differentiate_through_it() -> None:
    config = CONFIG.with_values(model={"normalisation": "group"})
    model = working_copy(initial_model(config).double())
    assert any(isinstance(layer, StandardisedConv2d) for layer in model.modules())
    inputs = torch.rand(4, 1, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(4) % 3
    results = [clipped_sum(model, sum_cross_entropy, inputs, labels, 0.5, m) for m in ("loop", "vmap", "hooks")]
    for other in results[1:]:
        for one, two in zip(results[0].gradients, other.gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    # A filter stands for the same one whatever is added to it or multiplied with it: no gradient points there.
    names = [name for name, _ in model.named_parameters()]
    first = results[0].gradients[names.index("0.weight")].flatten(1)
    torch.testing.assert_close(first.sum(dim=1), torch.zeros(len(first), dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_file_holds_an_ordinary_network_with_the_same_outputs(tmp_path: Path) -> None:
    model = initial_model(CONFIG)
    save_model(tmp_path / "model", model, CONFIG)
    loaded = load_model(tmp_path / "model", CONFIG)
    assert not any(isinstance(layer, StandardisedConv2d) for layer in loaded.modules())
    inputs = torch.rand(8, 1, 16, 16)
    torch.testing.assert_close(loaded(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    load_model(tmp_path / "model", CONFIG.with_values(model={"weight_standardisation": False}))
    with safe_open(tmp_path / "model", framework="pt") as file:
        assert "standard" not in str(file.metadata())
    assert plain_network(loaded) is loaded


def test_the_engine_fast_takes_what_was_folded() -> None:
    model, inputs = initial_model(CONFIG), torch.rand(16, 1, 16, 16)
    assert len(calibrate(plain_network(model), inputs).network.layers) > 3


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 7))
def test_folding_is_what_single_operations_on_float64_give(seed: int, channels: int, side: int) -> None:
    """All parties must write the same bytes, whatever their machine: here against Python's own numbers."""
    if side * channels == 1:
        return
    layer = nn.Conv2d(channels, 1, (1, side))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)))
    model = with_weight_standardisation(nn.Sequential(layer))

    def added(values: list[float]) -> float:
        while len(values) > 1:
            half = len(values) // 2
            values = [a + b for a, b in zip(values[:half], values[half : 2 * half], strict=True)] + values[2 * half :]
        return values[0]

    row = [float(value) for value in layer.weight.detach().reshape(-1)]
    mean = added(row) / len(row)
    centred = [value - mean for value in row]
    root = max(added([value * value for value in centred]), 1e-4) ** 0.5
    expected = torch.tensor([value / root for value in centred], dtype=torch.float64).float()
    folded = plain_network(model).state_dict()["0.weight"].reshape(-1)
    assert torch.equal(folded, expected)


def test_weights_that_were_not_standardised_are_refused() -> None:
    model = with_weight_standardisation(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()))
    with pytest.raises(ModelError, match="not standardised"):
        require_standardised(model)
    require_standardised(model, ("0.weight",))
    model.load_state_dict(plain_network(model).state_dict())
    require_standardised(model)
