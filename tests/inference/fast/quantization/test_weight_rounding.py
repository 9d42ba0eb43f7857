"""Weights are rounded so that results change least on what the layer reads, and what remains on average goes to the bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from mpc_fl.inference.fast.quantization.float_graph import prepare
from mpc_fl.inference.fast.quantization.weight_rounding import Inputs, InputsSum, rounded

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "groups": 2},
]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(seed: int, size: int, groups: int = 1) -> Inputs:
    """Inputs of which neighbours are alike, and their mean."""
    mixing = draw(seed, groups, size, 3) @ draw(seed + 1, groups, 3, size) + 0.1 * draw(seed + 2, groups, size, size)
    moments = mixing @ mixing.transpose(1, 2) / size + 1e-3 * torch.eye(size, dtype=torch.float64)
    return Inputs(draw(seed + 3, groups, size), moments, moments.diagonal(dim1=1, dim2=2).flatten())


def disturbance(errors: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """e^T G e of each output."""
    assert inputs.moments is not None
    return torch.einsum("goi,gij,goj->go", errors, inputs.moments, errors)


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 24))
def test_rounding_keeps_to_its_bound_and_tells_the_bias_what_is_left(seed: int, groups: int, size: int) -> None:
    inputs, weights = correlated(seed, size, groups), 40 * draw(seed + 9, 2 * groups, size, 1, 1)
    integers, correction = rounded(weights, inputs, 1 << 20)
    assert integers.dtype == torch.int64 and integers.shape == weights.shape
    errors = (weights - integers).reshape(groups, 2, size)
    expected = (errors @ inputs.mean.unsqueeze(-1)).reshape(-1)
    torch.testing.assert_close(correction, expected, rtol=1e-9, atol=1e-9)
    # Babai: no output is off by more than a quarter of the sum of the d_j.
    assert inputs.moments is not None
    bound = torch.linalg.cholesky(inputs.moments).diagonal(dim1=1, dim2=2).square().sum(1, keepdim=True) / 4
    assert bool((disturbance(errors, inputs) <= bound * (1 + 1e-6) + 1e-9).all())


def test_rounding_to_nearest_disturbs_several_times_as_much() -> None:
    inputs, weights = correlated(1, 48), 40 * draw(5, 64, 48, 1, 1)
    integers, _ = rounded(weights, inputs, 1 << 20)
    real = weights.reshape(1, 64, 48)
    ours = disturbance(real - integers.reshape(1, 64, 48), inputs).mean()
    assert float(ours) < 0.25 * float(disturbance(real - real.round(), inputs).mean())


def test_many_inputs_are_rounded_to_nearest_and_nothing_leaves_the_width() -> None:
    weights, mean = 40 * draw(2, 4, 30, 1, 1), draw(3, 1, 30)
    integers, _ = rounded(weights, Inputs(mean, None, torch.ones(30, dtype=torch.float64)), 1 << 20)
    assert torch.equal(integers, weights.round().to(torch.int64))
    for inputs in (Inputs(mean, None, torch.ones(30, dtype=torch.float64)), correlated(4, 30)):
        clipped, _ = rounded(weights, inputs, 25)
        assert int(clipped.abs().max()) == 25


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_statistics_are_those_of_the_patches(geometry: dict[str, Any]) -> None:
    """By torch's own unfold, over all patches of all records."""
    layer = nn.Conv2d(4, 6, **geometry)
    operation = next(each for each in prepare(layer.eval()).operations if each.kind == "Conv2d")
    images = draw(7, 3, 4, 9, 9).float()
    collected = InputsSum(operation, 3)
    collected.add(images[:2])
    collected.add(images[2:])
    found = collected.result()
    unfolded = functional.unfold(images.double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    patches = unfolded.reshape(3, layer.groups, -1, unfolded.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(found.mean, patches.mean(dim=1), rtol=1e-5, atol=1e-6)
    expected = patches.transpose(1, 2) @ patches / patches.shape[1]
    assert found.moments is not None
    damping = (found.moments - expected).diagonal(dim1=1, dim2=2)
    off_diagonal = found.moments - expected - torch.diag_embed(damping)
    assert float(off_diagonal.abs().max()) < 1e-5
    assert bool((damping > 0).all()) and float(damping.max()) < 0.02 * float(expected.diagonal(dim1=1, dim2=2).max())
    torch.testing.assert_close(found.squares, images.double().square().mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    assert 0 < found.effective <= float(found.squares.mean()) ** 0.5
