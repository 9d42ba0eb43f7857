"""Rescaling changes no logits, fills every range, leaves every channel its safety, and makes errors smaller."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.inference.fast.network import encode
from mpc_fl.inference.fast.quantization import calibration as calibration_module
from mpc_fl.inference.fast.quantization.calibration import calibrate, self_check
from mpc_fl.inference.fast.quantization.emulation import Emulator
from mpc_fl.inference.fast.quantization.float_graph import evaluate, prepare
from mpc_fl.inference.fast.quantization.rescaling import Rescaled, rescaled
from mpc_fl.inference.fast.quantization.scale_plan import ScalePlan
from mpc_fl.inference.fast.quantization.scales import WEIGHTED, Precision, Seen
from mpc_fl.inference.fast.quantization.weight_rounding import Inputs, InputsSum
from mpc_fl.inference.graph.tracing import Trace
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class Mixed(nn.Module):
    """Channels of very different size through all that factors must pass: groups, sums, pools, ReLU6, concatenation."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.capped = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.joined, self.hidden, self.head = nn.Conv2d(16, 8, 1, bias=False), nn.Linear(32, 12), nn.Linear(12, 3)
        with torch.no_grad():
            for layer in (self.first, self.second):
                layer.weight.mul_(torch.logspace(-2, 1, 8).reshape(-1, 1, 1, 1))
            self.norm.weight.copy_(torch.linspace(0.2, 5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.first(x)), 2)
        x = functional.relu(x + self.second(x))
        x = self.norm(x)  # not folded: a layer with weights of its own
        x = torch.cat([functional.relu6(self.capped(x)), functional.relu6(x)], 1)
        x = functional.relu(functional.adaptive_avg_pool2d(self.joined(x), 2)).flatten(1)
        return self.head(functional.relu(self.hidden(x)))


def seen_by(graph: Trace, records: torch.Tensor) -> tuple[dict[str, Seen], dict[str, Inputs]]:
    sums = {each.name: InputsSum(each, len(records)) for each in graph.operations if each.kind in WEIGHTED}
    seen = {}
    for name, value in evaluate(graph, records):
        seen[name] = Seen(tuple(value.shape[1:]), value.transpose(0, 1).flatten(1).abs().amax(dim=1).double())
        for each in sums.values():
            if each.operation.inputs[0] == name:
                each.add(value)
    return seen, {name: each.result() for name, each in sums.items()}


def plan_of(model: nn.Module, records: torch.Tensor) -> ScalePlan:
    graph = prepare(model.eval())
    return ScalePlan(graph, *seen_by(graph, records), Precision())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_values_are_multiplied_and_logits_stay(seed: int) -> None:
    records = images(4, 8, seed)
    plan = plan_of(Mixed(seed), records)
    full = rescaled(plan)
    before = dict(evaluate(plan.graph, records))
    for name, value in evaluate(full.graph, records):
        factors = full.factors[name].reshape(1, -1, *[1] * (value.dim() - 2))
        torch.testing.assert_close(value.double(), before[name].double() * factors, rtol=1e-4, atol=1e-4)
    assert bool((full.factors[plan.graph.input] == 1).all() and (full.factors[plan.graph.output] == 1).all())
    # What was seen of the values is multiplied as if it had been seen in the rescaled network.
    seen, inputs = seen_by(full.graph, records)
    for name in seen:
        torch.testing.assert_close(full.seen[name].peaks, seen[name].peaks, rtol=1e-4, atol=1e-6)
    for name, each in inputs.items():
        torch.testing.assert_close(full.inputs[name].mean, each.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(full.inputs[name].squares, each.squares, rtol=1e-3, atol=1e-6)
        factor, expected = full.inputs[name].cholesky(), each.moments
        assert factor is not None and expected is not None
        found = factor @ factor.transpose(1, 2)
        # The diagonal differs by the damping, which is multiplied as well.
        scale = float(expected.diagonal(dim1=1, dim2=2).max())
        assert float((found - expected).abs().max()) < 0.05 * scale


def test_a_layer_fills_its_range_and_every_channel_keeps_its_safety() -> None:
    records = images(8, 8)
    plan = plan_of(Mixed(0), records)
    full = rescaled(plan)
    after = ScalePlan(full.graph, full.seen, full.inputs, Precision())
    wider = filled = 0
    for group in {id(each): each for each in after.group.values() if each.truncated}.values():
        name = group.members[0]
        limit = group.limit / full.factors[name]
        own = plan.group[name]
        peaks = torch.stack([plan.seen[member].peaks.reshape(len(limit), -1).amax(1) for member in own.members]).amax(0)
        assert bool((limit >= 4 * peaks * (1 - 1e-9)).all())
        assert bool((limit >= limit.max() / 2 * (1 - 1e-9)).all())
        used = math.log2(group.needed) % 1
        if after.path(group.origins[0]) == "hidden":  # no other group shares its factor
            assert used > 1 - 1e-4
            filled += 1
        wider += int(len(full.factors[name].unique()) > 1)
    assert wider >= 3 and filled == 1
    # Where a ceiling or a concatenation is shared there is one factor.
    for operation in full.graph.operations:
        if operation.kind in ("Hardtanh", "Concat"):
            assert len(full.factors[operation.name].unique()) == 1


def test_rescaling_makes_errors_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    model, records, asked = Mixed(3), images(32, 16), images(64, 16, 1)
    calibrate_batchnorm(model, records)
    model.eval()
    with torch.no_grad():
        expected = model(asked)

    def error() -> float:
        calibration = calibrate(model, records)
        assert self_check(calibration, asked).fraction < 1
        emulator = Emulator(calibration.network, calibration.weights.inside_protocol())
        return float((emulator.logits(asked, Seed.from_system()) - expected).square().mean().sqrt())

    def as_it_was(plan: ScalePlan) -> Rescaled:
        ones = {name: torch.ones(each.shape[0], dtype=torch.float64) for name, each in plan.seen.items()}
        return Rescaled(plan.graph, plan.seen, plan.inputs, ones)

    full = error()
    monkeypatch.setattr(calibration_module, "rescaled", as_it_was)
    assert full < 0.8 * error()


@pytest.mark.parametrize("architecture", ["small_cnn", "resnet18"])
def test_pictures_of_eight_bits_enter_without_error(architecture: str) -> None:
    model = build_model(Config().with_values(model={"architecture": architecture}), input_shape=(3, 32, 32), seed=0)
    pictures = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    calibrate_batchnorm(model, pictures)
    network = calibrate(model.eval(), pictures).network
    scale = network.values[network.input].scale
    decoded = encode(network, pictures).double() * scale
    assert float((decoded - pictures.double()).abs().max()) < 1e-7  # float32 itself
    assert scale < 2.0**-9  # other images are rounded to as many bits as before
