"""Encrypted graph, layers and cost of the reference engine, in one process (world size 1) and, once, in two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpc_fl.errors import HeadroomError, ModelError, UnsupportedLayerError
from mpc_fl.inference.graph.tracing import simplify, trace
from mpc_fl.inference.reference import network as inference
from mpc_fl.learning.models.architectures import small_cnn
from mpc_fl.learning.models.batch_norm import FrozenBatchNorm2d
from mpc_fl.sharing.crypten_parts import crypten

import torchvision.models  # isort: skip  (after mpc_fl.learning.models.architectures has prepared it)
from mpc_fl.inference.reference import approximations


@pytest.fixture(scope="module", autouse=True)
def crypten_alone() -> Iterator[None]:
    """CrypTen with world size 1, taken back with everything it leaves in the environment."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    crypten.init()
    yield
    crypten.uninit()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def calibrated(model: nn.Module, *shape: int) -> nn.Module:
    """Random weights with BatchNorm statistics that fit them, as after training."""
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = None
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.2)
    model.train()
    with torch.no_grad():
        model(torch.randn(4, *shape))
    return model.eval()


def largest_difference(model: nn.Module, x: torch.Tensor) -> float:
    graph = inference.build_graph(model, tuple(x.shape[1:])).encrypt(src=0)
    with torch.no_grad():
        expected = model(x)
        shares = graph.forward(crypten.cryptensor(x))
    opened = shares.get_plain_text()
    assert opened.shape == expected.shape
    return float((opened - expected).abs().max())


def applied(function: Callable[[Any], Any], x: torch.Tensor) -> torch.Tensor:
    with crypten.no_grad():
        return function(crypten.cryptensor(x)).get_plain_text()


def kinds(model: nn.Module) -> list[str]:
    return [operation.kind for operation in simplify(trace(model)).operations]


# -- whole networks


def small_vgg(**_: Any) -> nn.Module:
    """vgg11 with its seven-by-seven adaptive pool and dropout, but not 130 million weights in the classifier."""
    model = torchvision.models.vgg11(num_classes=3, init_weights=False)
    model.classifier[0] = nn.Linear(25088, 32)
    model.classifier[3] = nn.Linear(32, 32)
    model.classifier[6] = nn.Linear(32, 3)
    return model


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "densenet121", "squeezenet1_1", "vgg11", "mobilenet_v3_small"]
)
def test_torchvision_network_gives_the_plaintext_logits(name: str) -> None:
    builder = small_vgg if name == "vgg11" else getattr(torchvision.models, name)
    model = builder(weights=None, num_classes=3)
    statistics_shape = (3, 64, 64)
    model = calibrated(model, *statistics_shape)
    assert largest_difference(model, torch.randn(1, 3, 32, 32)) < 0.05


class Functional(nn.Module):
    """The functional forms, with constants, a layer scale, standardised weights and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same", dilation=2)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x), inplace=True) * self.scale
        weight = self.second.weight - self.second.weight.mean((1, 2, 3), keepdim=True)
        y = torch.relu(F.conv2d(x, weight, None, 2, 1)).add_(0.25)
        z = F.max_pool2d(x, 3, 2, 1)
        z += y
        z = torch.cat([F.hardtanh(z, -2.0, 2.0), torch.sigmoid(y) * z], 1)
        z = F.dropout(z, 0.3, self.training)
        a = F.adaptive_avg_pool2d(z, (1, 1)).view(x.size(0), -1)
        b = torch.flatten(z.mean((2, 3), keepdim=True), 1)
        return self.last(a + b.reshape(-1, 16) + z.mean([2, 3]))


def gelu_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.GELU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.AdaptiveMaxPool2d((2, 3)),
        nn.Flatten(),
        nn.LayerNorm(48),
        nn.Sigmoid(),
        nn.Linear(48, 8),
        nn.BatchNorm1d(8),
        nn.Hardswish(),
        nn.Linear(8, 3),
    )


def frozen_first() -> nn.Module:
    """BatchNorm before the convolution cannot be folded; the frozen subclass counts as BatchNorm."""
    return nn.Sequential(FrozenBatchNorm2d(3), nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize("build", [Functional, gelu_norms, frozen_first, lambda: small_cnn((3, 16, 16), 3)])
def test_small_network_gives_the_plaintext_logits(build: Callable[[], nn.Module]) -> None:
    model = calibrated(build(), 3, 16, 16)
    assert largest_difference(model, torch.randn(3, 3, 16, 16)) < 0.01


# -- graph


def test_graph_depends_on_the_architecture_alone() -> None:
    model = calibrated(torchvision.models.resnet18(num_classes=3), 3, 64, 64)
    with torch.device("meta"):
        blank = torchvision.models.resnet18(num_classes=3).eval()
    owner, hospital = inference.build_graph(model), inference.build_graph(blank)
    assert owner.parameter_shapes() == hospital.parameter_shapes()
    assert owner.layer_names == hospital.layer_names
    assert [layer.inputs for layer in owner.layers] == [layer.inputs for layer in hospital.layers]


def test_batchnorm_is_folded_and_relu_follows_max_pool() -> None:
    found = kinds(torchvision.models.resnet18().eval())
    assert "Affine" not in found and found[:3] == ["Conv2d", "MaxPool2d", "ReLU"]
    assert found.count("Conv2d") == 20 and found.count("ReLU") == 17


def test_relu_with_another_user_stays_before_the_pool() -> None:
    class Forked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(x)
            return F.max_pool2d(x, 3, 1, 1) + x

    assert kinds(Forked().eval()) == ["ReLU", "MaxPool2d", "Add"]
    chained = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.ReLU6(), nn.AdaptiveMaxPool2d(1)).eval()
    assert kinds(chained) == ["MaxPool2d", "MaxPool2d", "AdaptiveMaxPool2d", "ReLU", "Hardtanh"]
    assert largest_difference(chained, torch.randn(1, 2, 12, 12) * 4) < 1e-3


def test_convolution_used_twice_is_not_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model = calibrated(Twice(), 2, 4, 4)
    assert kinds(model) == ["Conv2d", "Affine", "Add"]
    assert largest_difference(model, torch.randn(2, 2, 4, 4)) < 1e-3


def test_final_softmax_is_dropped_and_an_inner_one_refused() -> None:
    assert kinds(nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)).eval()) == ["Linear"]
    with pytest.raises(UnsupportedLayerError, match="layer '1' of type Softmax"):
        inference.build_graph(nn.Sequential(nn.Linear(3, 2), nn.Softmax(1), nn.Linear(2, 2)).eval())


def test_model_is_left_as_it_is_and_progress_names_every_layer() -> None:
    model = calibrated(small_cnn((1, 16, 16), 2), 1, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = inference.build_graph(model, (1, 16, 16))
    shared = graph.encrypt(src=0)
    heard: list[tuple[int, int, str]] = []
    x = torch.randn(1, 1, 16, 16)
    shared.forward(crypten.cryptensor(x), on_layer=lambda *step: heard.append(step))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for _, _, name in heard] == list(graph.layer_names)
    assert heard[0][:2] == (1, len(heard)) and heard[-1][0] == len(heard)
    assert graph.parameter_shapes() == shared.parameter_shapes()
    with pytest.raises(ModelError, match="encrypted already"):
        shared.encrypt(src=0)


@pytest.mark.parametrize(
    ("layer", "kind", "near"),
    [
        (nn.Tanh(), "Tanh", "Hardtanh"),
        (nn.ELU(), "ELU", "GELU"),
        (nn.LeakyReLU(), "LeakyReLU", "ReLU"),
        (nn.Conv1d(1, 1, 1), "Conv1d", "Conv2d"),
        (nn.LSTM(2, 2), "LSTM", "no supported layer"),
        (nn.InstanceNorm2d(2), "InstanceNorm2d", "GroupNorm"),
        (nn.BatchNorm2d(2, track_running_stats=False), "BatchNorm2d with statistics", "BatchNorm2d"),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), "Conv2d with padding_mode", "Conv2d"),
    ],
)
def test_unsupported_layer_is_named_with_the_nearest(layer: nn.Module, kind: str, near: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Identity(), layer)).eval()
    with pytest.raises(UnsupportedLayerError) as raised:
        inference.build_graph(model)
    assert f"'0.1' of type {kind}" in raised.value.what and near in raised.value.fix


def test_unsupported_function_and_untraceable_network() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x)

    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedLayerError, match="'0.tanh' of type tanh"):
        inference.build_graph(nn.Sequential(Block()).eval())
    with pytest.raises(ModelError, match="cannot be traced"):
        inference.build_graph(Branches().eval())
    with pytest.raises(UnsupportedLayerError, match="computes with the input's shape"):
        inference.build_graph(torchvision.models.shufflenet_v2_x0_5().eval())
    with pytest.raises(ModelError, match="training mode"):
        inference.build_graph(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="layer '1' does not fit"):
        inference.build_graph(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)).eval(), (1, 8, 8))


def test_unusable_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight[0, 0] = 1e6
    with pytest.raises(HeadroomError, match="layer '0'"):
        inference.build_graph(model).encrypt(src=0)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        inference.build_graph(model)


# -- layers one by one


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_max_pool_equals_torch(data: st.DataObject) -> None:
    kernel = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)))
    stride = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    dilation = data.draw(st.integers(1, 2))
    smallest = [max(1, dilation * (k - 1) + 1 - 2 * p) for k, p in zip(kernel, padding, strict=True)]
    sizes = [data.draw(st.integers(size, 12)) for size in smallest]
    pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=data.draw(st.booleans())).eval()
    x = torch.randint(-900, 900, (2, 2, *sizes)) / 64 - 20
    if bool(torch.isfinite(pool(x)).all()):
        assert largest_difference(pool, x) == 0
    else:
        with pytest.raises(ModelError, match="covers none"):
            inference.build_graph(pool, tuple(x.shape[1:]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d((2, 3), ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((7, 7)),
        nn.AdaptiveAvgPool2d((3, None)),
        nn.AdaptiveMaxPool2d((4, 3)),
        nn.AdaptiveMaxPool2d(1),
        nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        nn.Hardsigmoid(),
        nn.Hardtanh(-0.5, 0.25),
        nn.ReLU6(),
        nn.Linear(10, 3),
        nn.LayerNorm((9, 10), elementwise_affine=False),
    ],
    ids=str,
)
def test_layer_equals_torch(layer: nn.Module) -> None:
    torch.manual_seed(2)
    assert largest_difference(layer.eval(), torch.randn(2, 4, 9, 10) * 3) < 1e-3


@pytest.mark.parametrize(
    ("function", "expected", "bound"),
    [
        (approximations.gelu, F.gelu, 0.002),
        (approximations.silu, F.silu, 0.004),
        (approximations.sigmoid, torch.sigmoid, 0.002),
        (approximations.hardswish, F.hardswish, 2e-4),
    ],
)
def test_activation_keeps_its_stated_error(function: Any, expected: Any, bound: float) -> None:
    x = torch.cat([torch.linspace(-12, 12, 5001), torch.tensor([-1000.0, -100.0, 100.0, 1000.0])])
    assert float((applied(function, x) - expected(x)).abs().max()) < bound


def test_inverse_square_root_keeps_its_stated_error() -> None:
    for low, high, bound in ((2**-10, 2**16, 0.01), (2**-7, 2**11, 0.0015), (0.5, 2.0, 1e-4)):
        x = torch.logspace(0, 1, 500, base=high / low) * low
        assert float((applied(approximations.inverse_square_root, x) * x.sqrt() - 1).abs().max()) < bound
    assert bool(torch.isfinite(applied(approximations.inverse_square_root, torch.zeros(3))).all())


@pytest.mark.parametrize(("spread", "bound"), [(0.03, 0.02), (0.05, 0.005), (1.0, 0.001), (16.0, 0.005), (60.0, 0.02)])
def test_normalisation_keeps_its_stated_error(spread: float, bound: float) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 8, 6, 6) * spread + 1
    assert largest_difference(nn.GroupNorm(2, 8).eval(), x) < bound
    assert largest_difference(nn.LayerNorm((6, 6)).eval(), x) < bound


def test_batchnorm1d_on_sequences_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    assert largest_difference(model, torch.randn(4, 3)) < 1e-3
    with pytest.raises(ModelError, match="BatchNorm on 3 dimensions"):
        inference.build_graph(model, (3, 3))


# -- cost and check


def test_cost_of_relu_and_convolution_by_hand() -> None:
    relu = inference.cost(inference.build_graph(nn.Sequential(nn.ReLU()).eval()), (2, 5))
    assert relu["comparisons"] == relu["multiplications"] == 10
    assert relu["bytes_per_party"] == 10 * 232 and relu["rounds"] == 9 and relu["truncations"] == 0
    conv = inference.cost(inference.build_graph(nn.Sequential(nn.Conv2d(3, 4, 3)).eval()), (1, 3, 6, 6))
    assert conv["bytes_per_party"] == 8 * (3 * 36 + 4 * 27) and conv["rounds"] == 1
    assert conv["multiplications"] == 4 * 27 * 16 and conv["opened_weights"] == 8 * 4 * 27


def test_cost_grows_with_image_batch_and_parties() -> None:
    graph = inference.build_graph(torchvision.models.resnet18(num_classes=3).eval())
    base = inference.cost(graph, (1, 3, 64, 64))
    for larger in (
        inference.cost(graph, (1, 3, 96, 96)),
        inference.cost(graph, (2, 3, 64, 64)),
        inference.cost(graph, (1, 3, 64, 64), parties=3),
    ):
        assert larger["bytes_per_party"] > base["bytes_per_party"]
        assert all(larger[key] >= base[key] for key in base)


def test_cost_of_resnet18_at_224() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18(num_classes=3).eval()
    cost = inference.cost(inference.build_graph(model), (1, 3, 224, 224))
    assert cost["comparisons"] == 2_910_208 and cost["rounds"] == 210
    assert 0.7e9 < cost["bytes_per_party"] < 0.8e9


TWO_PARTIES = """
import json, torch
torch.set_num_threads(1)
from mpc_fl.inference.reference import network as inference
from mpc_fl.sharing.crypten_parts import crypten
import crypten.mpc.context
from crypten.config import cfg
from tests.inference.reference.test_network import gelu_norms

@crypten.mpc.context.run_multiprocess(world_size=2)
def party():
    rank = crypten.communicator.get().get_rank()
    torch.manual_seed(rank)  # the hospital, rank 0, has other weights and the owner no image
    model = gelu_norms().eval()
    graph = inference.build_graph(model).encrypt(src=1)
    torch.manual_seed(5)
    image = torch.randn(1, 3, 16, 16)
    x = crypten.cryptensor(image if rank == 0 else torch.zeros_like(image), src=0)
    cfg.communicator.verbose = True
    crypten.reset_communication_stats()
    shares = graph.forward(x)
    stats = crypten.communicator.get().get_communication_stats()
    logits = shares.get_plain_text()
    return float((logits - model(image)).abs().max()), stats["rounds"], stats["bytes"] // 2  # CrypTen adds both ways

result = party()
cost = inference.cost(inference.build_graph(gelu_norms().eval()), (1, 3, 16, 16))
print(json.dumps([result[1], cost["rounds"], cost["bytes_per_party"]]))
"""


@pytest.mark.processes
def test_two_parties_agree_with_plaintext_and_with_the_cost() -> None:
    import json

    root = str(Path(__file__).resolve().parents[3])
    hidden = {"RANK", "WORLD_SIZE", "RENDEZVOUS", "DISTRIBUTED_BACKEND"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", TWO_PARTIES],
        cwd=root,
        env={**environment, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (difference, rounds, sent), estimated_rounds, estimated_bytes = json.loads(done.stdout.splitlines()[-1])
    assert difference < 0.01
    assert (rounds, sent) == (estimated_rounds, estimated_bytes)


@pytest.mark.parametrize("value", [4097.0, -4097.0, float("inf"), float("nan")])
def test_blown_up_logits_are_told_from_others(value: float) -> None:
    logits = torch.full((3, 3), 4096.0)
    logits[1, 1] = value
    assert inference.within_bound(logits, 4096.0).tolist() == [True, False, True]


def test_wrapped_negative_element_is_detected() -> None:
    """The truncation failure of SecureML section 4.1, put into one share by hand."""
    model = calibrated(torchvision.models.resnet18(num_classes=3), 3, 64, 64)
    graph = inference.build_graph(model).encrypt(src=0)
    reference = graph.layers[10]
    assert reference.kind == "Conv2d"

    original = reference.module

    def wrapped(x: Any) -> Any:
        y = original(x)
        flat = y.share.view(-1)
        flat[int(flat.argmin())] += 2**48
        return y

    object.__setattr__(reference, "module", wrapped)
    logits = graph.forward(crypten.cryptensor(torch.randn(1, 3, 64, 64))).get_plain_text()
    assert inference.within_bound(logits, 4096.0).tolist() == [False]
