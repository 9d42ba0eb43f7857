"""Float networks to integer networks: ranges, scales, errors by name, risk in figures, and the emulation as oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import HeadroomError, SecrecyError, UnsupportedLayerError
from mpc_fl.inference.fast.kernels.linear import truncate as truncate_share
from mpc_fl.inference.fast.layers import Add, AveragePool, Convolution, MaxPool, ReLU, SignExtension
from mpc_fl.inference.fast.messages import describe
from mpc_fl.inference.fast.network import encode, encode_silently
from mpc_fl.inference.fast.quantization.calibration import Calibration, calibrate, self_check, stress_records
from mpc_fl.inference.fast.quantization.emulation import Emulator, truncate
from mpc_fl.inference.fast.quantization.risk import Range
from mpc_fl.inference.fast.quantization.scales import Precision
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm

torch.set_num_threads(1)


def images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class EveryShape(nn.Module):
    """What torchvision's classifiers are made of: all that the engine knows, in unusual combinations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.dense_norm, self.dense = nn.BatchNorm2d(10), nn.Conv2d(10, 6, 3, padding=1, bias=False)
        self.transition = nn.Conv2d(16, 8, 1)
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.project, self.shortcut = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2)
        self.average = nn.AvgPool2d(3, 1, padding=1)
        self.last_norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        x = torch.cat([functional.relu(self.left(x)), functional.relu(self.right(x))], 1)
        x = torch.cat([x, self.dense(functional.relu(self.dense_norm(x)))], 1)  # a value that no ReLU follows
        x = functional.avg_pool2d(self.transition(x), 2)
        x = x + self.project(self.depthwise(x)) + self.shortcut(x)
        x = self.average(x)  # 9 pixels: no power of two
        x = functional.relu(self.grouped(x)) * 0.5 + 0.25
        return self.head(self.last_norm(x.mean([2, 3])))


def every_shape() -> nn.Module:
    torch.manual_seed(0)
    model = EveryShape()
    calibrate_batchnorm(model, images(64, 37))
    return model.eval()


def logit_error(model: nn.Module, calibration: Calibration, records: torch.Tensor) -> float:
    emulator = Emulator(calibration.network, calibration.weights.inside_protocol())
    with torch.no_grad():
        return float((emulator.logits(records, Seed.from_system()) - model(records)).abs().max())


@pytest.mark.parametrize(
    "architecture, size, bound",
    [
        ("small_cnn", 32, 0.005),
        ("resnet18", 32, 0.02),
        ("squeezenet1_1", 64, 0.005),
        ("mobilenet_v2", 32, 0.05),
        ("efficientnet_lite0", 32, 0.05),
        pytest.param("densenet121", 32, 0.03, marks=pytest.mark.slow),
        pytest.param("googlenet", 64, 0.03, marks=pytest.mark.slow),
        pytest.param("vgg11", 224, 0.005, marks=pytest.mark.slow),
    ],
)
def test_integers_give_the_logits_of_known_networks(architecture: str, size: int, bound: float) -> None:
    model = build_model(Config().with_values(model={"architecture": architecture}), input_shape=(3, size, size), seed=0)
    calibrate_batchnorm(model, images(32, size))
    calibration = calibrate(model.eval(), images(12, size))
    assert logit_error(model, calibration, images(3, size)) < bound
    narrow = [value.bits for value in calibration.network.values.values() if not value.wide]
    assert max(narrow) <= 20
    assert calibration.network.values[calibration.network.output].bits <= 20


def test_integers_give_the_logits_of_unusual_combinations() -> None:
    model = every_shape()
    calibration = calibrate(model, images(16, 37))
    kinds = [type(layer) for layer in calibration.network.layers]
    assert {Convolution, ReLU, MaxPool, AveragePool, Add, SignExtension} <= set(kinds)
    assert logit_error(model, calibration, images(16, 37)) < 0.03  # the last BatchNorm multiplies by up to 40


@pytest.mark.parametrize(
    "precision", [Precision(11, 13), Precision(12, 12), Precision(12, gate_bits=24), Precision(10)]
)
def test_other_precisions_fit_and_are_near(precision: Precision) -> None:
    model = every_shape()
    calibration = calibrate(model, images(16, 37), precision)
    assert logit_error(model, calibration, images(16, 37)) < 0.1
    assert all(value.bits <= precision.gate_bits or value.wide for value in calibration.network.values.values())


def test_more_bits_give_smaller_errors() -> None:
    # 24-bit gates hold 16 + 16 bits no better than 32 bits of ring allow, but 5 bits must be worse than 12.
    model = every_shape()
    errors = [logit_error(model, calibrate(model, images(16, 37), Precision(bits)), images(16, 37)) for bits in (5, 12)]
    assert errors[1] < errors[0] / 8


def test_a_residual_network_truncates_once_per_gate_and_extends_nothing() -> None:
    config = Config().with_values(model={"architecture": "resnet18"})
    model = build_model(config, input_shape=(3, 64, 64), seed=0)
    calibrate_batchnorm(model, images(8, 64))
    layers = calibrate(model.eval(), images(8, 64)).network.layers
    assert not any(isinstance(layer, SignExtension) for layer in layers)
    truncations = sum(layer.shift > 0 for layer in layers)
    gates = sum(isinstance(layer, ReLU) for layer in layers)
    assert truncations == gates + 1  # and the logits
    assert sum(isinstance(layer, Add) for layer in layers) == 8  # the residual sums, no more


@settings(max_examples=200, deadline=None)
@given(
    value=st.integers(-(1 << 31), (1 << 31) - 1),
    share=st.integers(0, (1 << 32) - 1),
    shift=st.integers(1, 24),
    narrow=st.booleans(),
)
def test_truncation_is_that_of_the_shares(value: int, share: int, shift: int, narrow: bool) -> None:
    bits = 27 if narrow else 32
    value = ((value + (1 << (bits - 1))) % (1 << bits)) - (1 << (bits - 1))
    emulated = int(truncate(torch.tensor([value]), bits, shift, torch.tensor([share]))[0])
    hospital = truncate_share(np.array([share % (1 << bits)], dtype=np.uint32), bits, shift, True)
    owner = truncate_share(np.array([(value - share) % (1 << bits)], dtype=np.uint32), bits, shift, False)
    together = int(hospital[0] + owner[0]) % (1 << (bits - shift))
    assert emulated % (1 << (bits - shift)) == together
    modulus = 1 << (bits - shift)
    assert emulated % modulus in ((value >> shift) % modulus, -((-value) >> shift) % modulus)
    assert -modulus // 2 <= emulated < modulus // 2


def test_truncation_has_no_bias() -> None:
    # 200,000 values of fraction 3 / 16: the mean's standard error is 0.0009; 6 of them, false alarm 1e-9.
    values = torch.full((200_000,), 1003)
    shares = Seed.from_system().stream("shares").ring_elements((200_000,), 32)
    mean = float(truncate(values, 32, 4, shares).double().mean())
    assert abs(mean - 1003 / 16) < 6 * 0.0009


def test_the_shares_given_decide_every_rounding() -> None:
    calibration = calibrate(every_shape(), images(8, 37))
    network = calibration.network
    emulator = Emulator(network, calibration.weights.inside_protocol())
    elements = encode(network, images(2, 37))
    shares = {
        layer.output: torch.randint(0, 1 << 32, (2, *network.values[layer.output].shape))
        for layer in network.layers
        if layer.shift
    }
    first, second = emulator.run(elements, shares), emulator.run(elements, dict(shares))
    assert torch.equal(first[network.output], second[network.output])
    # The last truncation with shares whose low bits are zero rounds up, others down or up.
    last = {**shares, network.output: torch.zeros_like(shares[network.output])}
    up = emulator.run(elements, last)[network.output]
    assert bool((up >= first[network.output]).all()) and int((up - first[network.output]).max()) <= 1
    with pytest.raises(KeyError):
        emulator.run(elements, {})


def test_kept_values_are_those_of_every_layer_and_within_their_width() -> None:
    calibration = calibrate(every_shape(), images(8, 37))
    network = calibration.network
    emulator = Emulator(network, calibration.weights.inside_protocol())
    values = emulator.run(encode(network, images(2, 37)), Seed.from_system(), keep=True)
    assert set(values) == set(network.values)
    for name, value in network.values.items():
        assert values[name].shape == (2, *value.shape)
        assert int(values[name].abs().max()) < 1 << (value.bits - 1)


def linear_network(weight: float, bias: float = 0.0) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        for layer in (model[0], model[2]):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            layer.weight.fill_(0.25)
            layer.bias.zero_()
        assert isinstance(model[0], nn.Conv2d) and model[0].bias is not None
        model[0].weight.fill_(weight)
        model[0].bias.fill_(bias)
    return model.eval()


def test_a_layer_that_cannot_fit_is_named() -> None:
    with pytest.raises(HeadroomError, match="layer '0' reaches 900.*14 bits"):
        calibrate(linear_network(300), torch.ones(2, 3, 4, 4), Precision(8, gate_bits=14))
    with pytest.raises(HeadroomError, match="layer '0' is not finite"):
        calibrate(linear_network(3e38), torch.full((2, 3, 4, 4), 3e38))
    # Range taken up by a bias of 4000: the weights of 1e-6 would have no bits left.
    with pytest.raises(HeadroomError, match="layer '0' leaves its weights too few bits"):
        calibrate(linear_network(1e-6, bias=4000.0), torch.ones(2, 3, 4, 4), Precision(6))
    calibrate(linear_network(300), torch.ones(2, 3, 4, 4), Precision(6))


def test_the_limit_is_where_results_become_wrong() -> None:
    model = linear_network(1.0)
    calibration = calibrate(model, torch.ones(4, 3, 4, 4), Precision(safety=4))
    # The first layer reaches 3, 4 times as much fits: 12.
    first = calibration.ranges[0]
    assert (first.path, first.largest, first.limit) == ("0", 3.0, pytest.approx(12.0, rel=1e-5))
    inside, outside = torch.full((1, 3, 4, 4), 3.97), torch.full((1, 3, 4, 4), 4.12)
    assert self_check(calibration, inside).fraction == pytest.approx(3.97 / 4, rel=1e-5)
    assert logit_error(model, calibration, inside) < 0.01
    with pytest.raises(HeadroomError, match=r"record 2 leaves the range of layer '0' \(1.03 times\)"):
        self_check(calibration, torch.cat([inside, inside, outside]))
    assert logit_error(model, calibration, outside) > 1  # silently wrong, which is why ranges are checked beforehand


def test_values_that_are_compared_with_each_other_keep_a_bit_for_differences() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    capped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(64, 2)).eval()
    records = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for model in (pooled, capped):
        calibration = calibrate(model, records)
        network = calibration.network
        first = next(layer for layer in network.layers if layer.path == "0" and layer.shift)
        for path, output in (("0", first.output), (calibration.ranges[-1].path, network.output)):
            limit = next(each.limit for each in calibration.limits if each.path == path)
            value = network.values[output]
            if (
                model is capped and path == "0"
            ):  # x - 6 must fit: from a limit below zero it takes away the ceiling alone
                assert limit == 2.0 ** (value.bits - 1) * value.scale - 6
            else:
                assert limit == 2.0 ** (value.bits - 2) * value.scale  # half of what the width holds


def test_a_capped_value_is_right_up_to_its_limit_and_so_is_an_extended_one() -> None:
    """min(relu(x), 6) of values as far below zero as ranges allow, and a value that is extended: as in plaintext."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU6(), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Flatten(),
                          nn.Linear(32, 3)).eval()  # fmt: skip
    torch.manual_seed(4)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([30.0, -30.0]).reshape(2, 1, 1, 1))
        model[0].bias.zero_()
    records = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.5
    calibration = calibrate(model, records)
    kinds = [type(layer) for layer in calibration.network.layers]
    assert SignExtension in kinds
    extended = next(layer for layer in calibration.network.layers if isinstance(layer, SignExtension))
    limit = next(each.limit for each in calibration.limits if each.path == extended.path)
    value = calibration.network.values[extended.inputs[0]]
    assert limit <= 2.0 ** (value.bits - 2) * value.scale  # a bit to spare
    far = 0.99 * min(each.limit for each in calibration.limits if each.path == "0") / 30
    inside = torch.full((1, 1, 4, 4), far)
    assert self_check(calibration, inside).fraction < 1
    assert logit_error(model, calibration, inside) < 0.02


def test_only_equal_gates_move_behind_a_concatenation() -> None:
    class Branches(nn.Module):
        def __init__(self, second: nn.Module) -> None:
            super().__init__()
            self.left, self.right, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), second
            self.head = nn.Linear(128, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            both = torch.cat([functional.relu(20 * self.left(x)), self.second(20 * self.right(x))], 1)
            return self.head(both.flatten(1))

    for second, gates in ((nn.ReLU(), 1), (nn.ReLU6(), 2), (nn.Identity(), 1)):
        torch.manual_seed(0)
        model, records = Branches(second).eval(), images(8, 4)
        calibration = calibrate(model, records)
        assert logit_error(model, calibration, records) < 0.02
        assert sum(isinstance(layer, ReLU) for layer in calibration.network.layers) == gates


def test_the_safety_factor_holds_on_calibration_data() -> None:
    for safety in (1.0, 4.0, 16.0):
        calibration = calibrate(every_shape(), images(16, 37), Precision(11, safety=safety))
        closest = self_check(calibration, images(16, 37))
        assert closest.fraction <= (1 + 1e-5) / safety
        assert calibration.risk.closest.largest / calibration.risk.closest.limit == pytest.approx(
            closest.fraction, rel=1e-4
        )
        path = next(each for each in calibration.ranges if each.path == closest.path)
        assert path.largest / path.limit == pytest.approx(closest.fraction, rel=1e-4)


def test_stress_records_widen_ranges_that_uniform_images_leave_narrow() -> None:
    edges = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(196, 2)).eval()
    with torch.no_grad():
        edges[0].weight.copy_(torch.tensor([[[[0, -1, 0], [-1, 4, -1], [0, -1, 0]]]]))  # sees changes alone
    ramp = torch.linspace(0, 1, 16).expand(1, 1, 16, 16).contiguous()
    calibration = calibrate(edges, ramp)
    assert calibration.ranges[0].largest < 1e-5 and calibration.ranges[0].limit == pytest.approx(
        8, rel=1e-5
    )  # 4 by noise, twice
    stripes = (torch.arange(256).reshape(1, 1, 16, 16) % 2).float()
    assert self_check(calibration, stripes).fraction < 1
    assert torch.equal(stress_records(ramp), stress_records(ramp))
    assert float(stress_records(2 * ramp - 1).min()) == -1 and float(stress_records(2 * ramp - 1).max()) == 1


def test_bits_are_balanced_between_activations_and_weights() -> None:
    def activation_bits(weight: float, outlier: float = 0.0) -> tuple[float, bool]:
        """Fractional bits of what the second convolution reads, and whether its result had to be scaled up."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 8, 1), nn.Flatten(), nn.Linear(32, 3))
        with torch.no_grad():
            model[2].weight.mul_(weight)
            model[2].weight[0, 0] += outlier
            model[2].bias.fill_(4.0)  # so that the result's range stays the same
        network = calibrate(model.eval(), images(8, 2), Precision(16)).network
        lifted = any(isinstance(layer, Add) for layer in network.layers)
        return -math.log2(network.values[network.linear_layers[1].inputs[0]].scale), lifted

    small, usual, outlier = activation_bits(0.05), activation_bits(0.5), activation_bits(0.05, 3.0)
    assert small[0] <= usual[0] - 1
    # A large weight takes the place of the others' bits: activations get what weights of two bytes cannot use.
    assert outlier[0] > small[0] and not outlier[1]


def test_the_balance_makes_errors_smaller() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64, 3, padding=1), nn.Flatten())
    model.append(nn.Linear(64 * 36, 3)).eval()
    with torch.no_grad():
        model[4].weight.mul_(20.0)
    records = images(8, 6)
    errors = [logit_error(model, calibrate(model, records, each), records) for each in (Precision(), Precision(12, 12))]
    assert errors[0] < errors[1] / 2


def test_risk_estimates_are_right_for_known_laws() -> None:
    draw = np.random.default_rng(0)
    # Exceeding the limit has probability 1e-3 by both laws; 4000 maxima. Estimates within a factor of 3 (about 6 standard
    # errors of the exponent; seeded, so no false alarm).
    gumbel = Range("layer", 5 - math.log(1e-3), torch.from_numpy(draw.gumbel(5.0, 1.0, 4000)))
    assert 1e-3 / 3 < gumbel.gumbel < 3e-3
    pareto = Range("layer", 1e-3 ** (-1 / 6), torch.from_numpy(1 + draw.pareto(6.0, 4000)))
    assert 1e-3 / 3 < pareto.power_law < 3e-3
    assert gumbel.beyond_seen == 1 / 4001
    # The heavier tail is the more careful estimate.
    far = Range("layer", 40.0, gumbel.maxima)
    assert far.power_law > far.gumbel


def test_few_images_state_no_false_certainty() -> None:
    single = Range("layer", 10.0, torch.tensor([1.0], dtype=torch.float64))
    assert single.gumbel == single.power_law == 1.0 and single.beyond_seen == 0.5


def test_more_calibration_images_lower_the_stated_risk() -> None:
    model = every_shape()
    few, many = (calibrate(model, images(count, 37)).risk for count in (8, 64))
    assert (few.images, many.images) == (8, 64)
    assert many.beyond_seen < few.beyond_seen
    assert many.power_law < 1e-3


def test_weights_are_private() -> None:
    calibration = calibrate(every_shape(), images(4, 37))
    with pytest.raises(SecrecyError):
        str(calibration.weights)
    with pytest.raises(SecrecyError):
        str(calibration)
    integers = calibration.weights.inside_protocol()
    assert "tensor" not in repr(integers) and "tensor" not in repr(Emulator(calibration.network, integers))
    assert set(integers.weights) == {layer.output for layer in calibration.network.linear_layers}
    assert all(tensor.dtype == torch.int32 for tensor in (*integers.weights.values(), *integers.biases.values()))


def capped(factor: float) -> Calibration:
    """A network with ReLU6, calibrated on data of which the brightest is `factor` times as bright."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.Hardtanh(0.0, 3.7), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 3),
    ).eval()  # fmt: skip
    return calibrate(model, factor * images(8, 22))


def test_the_public_plan_shows_powers_of_two_alone() -> None:
    """Data that differ by less than their power of two give one and the same public network, byte for byte."""
    one, other = capped(1.0), capped(1.03)
    assert one.ranges[0].largest != other.ranges[0].largest
    assert describe(one.network) == describe(other.network)
    # A ceiling is what the architecture says, at a scale that is a power of two.
    for layer in one.network.layers:
        if isinstance(layer, ReLU) and layer.ceiling is not None:
            scale = one.network.values[layer.inputs[0]].scale
            assert math.log2(scale).is_integer() and layer.ceiling == round({"1": 6.0, "3": 3.7}[layer.path] / scale)


@pytest.mark.parametrize("make", [lambda: capped(1.0), lambda: calibrate(every_shape(), images(16, 37))])
def test_every_public_number_is_architecture_or_a_power_of_two(make: Callable[[], Calibration]) -> None:
    network = make().network
    for value in network.values.values():
        # 2^-e / d, d of windows (9 and 7 pixels squared) and grey levels alone.
        mantissa = math.frexp(1 / value.scale)[0]
        windows = {math.frexp(float(levels * 9**nines * 49**sevens))[0]
                   for levels in (1, 255) for nines in (0, 1, 2) for sevens in (0, 1)}  # fmt: skip
        assert any(mantissa == pytest.approx(each, rel=1e-12) for each in windows)
    for layer in describe(network)["layers"]:
        assert set(layer) <= {"kind", "path", "inputs", "output", "shift", "ceiling", "weight_bits", "multipliers",
                              "multiplier", "constant", "weight_shape", "stride", "padding", "dilation", "groups",
                              "kernel"}  # fmt: skip
        multipliers = [layer.get("multiplier", 1), *layer.get("multipliers", ())]
        assert all(number.bit_count() == 1 for number in multipliers) and layer.get("constant", 0) == 0
        assert layer.get("weight_bits", 16) in (16, 24, 32)


def test_the_public_width_of_weights_holds() -> None:
    for precision in (Precision(), Precision(8, 18)):
        calibration = calibrate(every_shape(), images(8, 37), precision)
        integers = calibration.weights.inside_protocol()
        for layer in calibration.network.linear_layers:
            largest = int(integers.weights[layer.output].abs().max())
            assert largest < 1 << (layer.weight_bits - 1)
            assert layer.weight_bits in (16, 24, 32)


@pytest.mark.parametrize(
    "model, named",
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.GELU(), nn.Flatten(), nn.Linear(48, 2)), "layer '1' .GELU"),
        (nn.Sequential(nn.Conv2d(3, 2, 1), nn.Hardtanh(-1, 1), nn.Flatten()), "layer '1' .Hardtanh"),
        (nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(3), nn.Flatten()), "layer '1' pools 4 x 4"),
        (nn.Sequential(nn.GroupNorm(1, 3), nn.Flatten()), "layer '0' .GroupNorm"),
    ],
)
def test_a_layer_without_integer_counterpart_is_named(model: nn.Module, named: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=named):
        calibrate(model.eval(), torch.rand(2, 3, 4, 4))


def test_impossible_precisions_and_records_are_refused() -> None:
    for arguments in ({"gate_bits": 25}, {"gate_bits": 10, "activation_bits": 12}, {"safety": 0.5}):
        with pytest.raises(HeadroomError):
            Precision(**arguments)  # type: ignore[arg-type]
    with pytest.raises(HeadroomError, match="at least one record"):
        calibrate(every_shape(), images(0, 37))
    network = calibrate(every_shape(), images(4, 37)).network
    with pytest.raises(HeadroomError, match="shape"):
        encode(network, images(1, 36))
    # The hospital's are cut off instead: an error would tell the model owner, who chose the scale.
    assert encode_silently(network, images(2, 37)).equal(encode(network, images(2, 37)))
    most, record = (1 << 31) - 1, torch.zeros(1, 3, 37, 37)
    record[0, :, 0, 0] = torch.tensor([math.inf, -1e30, math.nan])
    assert encode_silently(network, record)[0, :, 0, 0].tolist() == [most, -most, 0]
    with pytest.raises(HeadroomError, match="shape"):
        encode_silently(network, images(1, 36))
    for bad in (math.nan, math.inf, 1e9):
        with pytest.raises(HeadroomError, match="not finite"):
            encode(network, torch.full((1, 3, 37, 37), bad))
