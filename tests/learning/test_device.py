"""Where networks are computed: the same results up to rounding on every device, gradients clipped exactly, refusals in a line."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import nn

from mpc_fl.config.config import Config, parse_config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.learning import device as devices
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.device import CPU, Device, OnDevice, device_of, follow, gradients_of, on_device, repeatable
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.evaluation import predict
from mpc_fl.learning.training.dp_sgd import LocalTraining, train_locally
from mpc_fl.learning.training.per_sample_gradients import (
    Method,
    choose_per_sample_method,
    clipped_sum,
    sum_cross_entropy,
    working_copy,
)

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


def place(name: str) -> torch.device:
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


ON = [(name, precision) for name in ("cpu", "cuda") for precision in ("float32", "bfloat16")]


@pytest.fixture(params=[pytest.param(pair, marks=no_gpu if pair[0] == "cuda" else ()) for pair in ON], ids="-".join)
def device(request: pytest.FixtureRequest, flags: None) -> Device:
    name, precision = request.param
    if name == "cuda":
        return device_of(parse_config({"site": {"device": "cuda:0", "precision": precision}}, "test"))
    return Device(place(name), precision)


@pytest.fixture
def flags() -> Iterator[None]:
    """How this process computes is as before afterwards."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (torch.are_deterministic_algorithms_enabled(), matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic)
    also = (cudnn.benchmark, cudnn.enabled)
    yield
    torch.use_deterministic_algorithms(before[0])
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = before[1:]
    cudnn.benchmark, cudnn.enabled = also


def network(seed: int = 1) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    records = torch.rand(12, 1, 32, 32, generator=generator)
    model = build_model(Config(), seed=seed)
    calibrate_batchnorm(model, records)
    return working_copy(model), records, torch.arange(12) % 3


def tolerance(device: Device) -> float:
    return 0.1 if device.precision == "bfloat16" else 1e-5


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.cpu().reshape(-1) for tensor in tensors])


# ---- results -----------------------------------------------------------------------------------------------------------


def test_predictions_agree_and_come_back_in_float32(device: Device) -> None:
    model, records, _ = network()
    expected, found = predict(model, records), predict(on_device(model, device), records)
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    assert float((found - expected).abs().max()) < tolerance(device) * float(expected.abs().max())
    assert torch.equal(predict(on_device(model, device), records), found)  # the same bits again
    if device.place.type == "cpu":
        assert torch.equal(predict(on_device(model, device.exact), records), expected)


@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_clipped_sums_agree(device: Device, method: Method) -> None:
    model, records, labels = network()
    expected = clipped_sum(model, sum_cross_entropy, records, labels, 0.5, method)
    found = clipped_sum(on_device(model, device), sum_cross_entropy, records, labels, 0.5, method)
    difference = joined(found.gradients) - joined(expected.gradients)
    assert float(difference.norm()) < tolerance(device) * float(joined(expected.gradients).norm())
    assert torch.allclose(found.norms.cpu(), expected.norms, rtol=2 * tolerance(device))
    assert torch.allclose(found.losses.cpu(), expected.losses, rtol=tolerance(device), atol=tolerance(device))
    assert {gradient.dtype for gradient in found.gradients} == {torch.float32}


@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_no_record_exceeds_the_clipping_norm_in_any_precision(device: Device, method: Method) -> None:
    """The sensitivity rests on that: what bfloat16 rounds within a gradient is clipped after it."""
    model, records, labels = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)  # nobody is classified so well that there is nothing to clip
    computed = on_device(model, device)
    for row in range(len(records)):
        alone = clipped_sum(
            computed, sum_cross_entropy, 5 * records[row : row + 1], labels[row : row + 1], 0.01, method
        )
        assert float(joined(alone.gradients).double().norm()) <= 0.01
        assert float(alone.norms[0]) > 0.01  # it was clipped


def test_bfloat16_is_used_and_rounds(flags: None) -> None:
    model, records, _ = network()
    exact, rounded = predict(model, records), predict(on_device(model, Device(place("cpu"), "bfloat16")), records)
    assert 0 < float((exact - rounded).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("mechanism", ["none", "local"])
def test_local_training_makes_the_same_update_up_to_rounding(device: Device, mechanism: str) -> None:
    model, records, labels = network()
    data = Dataset(records, labels, torch.arange(12), tuple(map(str, range(12))))
    values = {"privacy": {"mechanism": mechanism}, "training": {"local_steps": 4, "batch_size": 12}}
    config = parse_config(values, "test")

    def update(where: Device) -> torch.Tensor:
        training = LocalTraining(config, 0.01, 1.0, sampling_seed=3, method="vmap", device=where)
        return train_locally(model, data, training, 1, Seed(b"s" * 32)).update

    before = copy.deepcopy(model.state_dict())
    expected, found = update(CPU), update(device)
    assert found.device.type == "cpu" and found.dtype == torch.float32
    assert float(torch.nn.functional.cosine_similarity(found, expected, dim=0)) > 1 - 10 * tolerance(device) ** 2 - 1e-4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_method_is_chosen_on_the_device(device: Device) -> None:
    assert choose_per_sample_method(network()[0], (1, 32, 32), 4, device=device) in get_args(Method)


# ---- copies ------------------------------------------------------------------------------------------------------------


def test_on_the_cpu_in_float32_a_network_is_computed_as_it_is() -> None:
    model, _, _ = network()
    assert on_device(model, CPU) is model
    follow(model, model)
    gradients_of(model, model)


def test_a_copy_follows_its_network_and_gives_it_its_gradients() -> None:
    """As on a GPU, with a copy on the CPU."""
    model, records, labels = network()
    computed = OnDevice(copy.deepcopy(model), CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    assert not torch.equal(predict(computed, records), predict(model, records))
    follow(computed, model)
    assert torch.equal(predict(computed, records), predict(model, records))
    sum_cross_entropy(computed(records), labels).backward()
    gradients_of(computed, model)
    brought = [parameter.grad for parameter in model.parameters()]
    assert all(own.grad is None for own in computed.parameters())
    expected = torch.autograd.grad(sum_cross_entropy(model(records), labels), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(brought, expected, strict=True) if a is not None)
    assert [name.removeprefix("network.") for name, _ in computed.named_parameters()] == [
        name for name, _ in model.named_parameters()
    ]


# ---- what is there -----------------------------------------------------------------------------------------------------


def configured(device: str, mechanism: str = "local") -> Config:
    return parse_config({"site": {"device": device}, "privacy": {"mechanism": mechanism}}, "test")


def test_a_device_that_is_missing_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^site\.device is cuda:1, and torch .*: set site\.device to cpu or auto"):
        device_of(configured("cuda:1"))
    assert device_of(configured("auto")) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"the last GPU here is cuda:1: name one that is there"):
        device_of(configured("cuda:2"))


@pytest.mark.parametrize(("wanted", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_a_gpu_computes_repeatably_and_without_cudnn_where_noise_is_distributed(
    monkeypatch: pytest.MonkeyPatch, flags: None, wanted: str, index: int, mechanism: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled = True, True
    assert device_of(configured(wanted, mechanism)) == Device(torch.device("cuda", index))
    cudnn = torch.backends.cudnn
    assert torch.are_deterministic_algorithms_enabled() and devices.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert (cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic) == (False, False, True)
    assert not torch.backends.cuda.matmul.allow_tf32 and cudnn.enabled == (mechanism == "local")


def test_on_the_cpu_nothing_of_the_process_is_changed() -> None:
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.enabled)
    device_of(configured("cpu", "distributed"))
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.enabled) == before


def test_an_operation_without_a_repeatable_algorithm_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"cannot be trained repeatably on a GPU: avg_pool3d_backward_cuda: set site"):
        with repeatable():
            raise RuntimeError("avg_pool3d_backward_cuda does not have a deterministic implementation, but you set")
    with pytest.raises(RuntimeError, match="else"), repeatable():
        raise RuntimeError("something else")


def test_what_differs_between_sites_is_in_no_digest_and_does_not_go_with_what_cannot_use_it() -> None:
    plain, other = Config(), parse_config({"site": {"device": "cuda:1", "precision": "bfloat16"}}, "test")
    assert (plain.digest(), plain.settings_of_run()) == (other.digest(), other.settings_of_run())
    assert plain.site.device == "cpu"
    for site in ({"device": "auto"}, {"precision": "bfloat16"}):
        with pytest.raises(ConfigError, match="training_processes share out work on the CPU in float32"):
            parse_config({"site": {"training_processes": 2, **site}}, "test")
    with pytest.raises(ConfigError, match=r"distributed needs gradients in float32"):
        parse_config({"privacy": {"mechanism": "distributed"}, "site": {"precision": "bfloat16"}}, "test")
    for name in ("gpu", "cuda:", "cuda:x", "mps", "cuda:100"):
        with pytest.raises(ConfigError, match=r"site\.device"):
            configured(name)
