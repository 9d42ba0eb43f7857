"""Graph rewriting: nothing in place, the same outputs; BatchNorm folded, nearly the same outputs."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import fx, nn

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.rewriting import fold_batchnorm, trace, without_in_place

torch.set_num_threads(1)

CLASSIFIERS = [
    "resnet18",
    "squeezenet1_1",
    "mobilenet_v2",
    "densenet121",
    "shufflenet_v2_x0_5",
    "googlenet",
    "small_cnn",
]


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def network(architecture: str, size: int = 32) -> nn.Module:
    config = Config().with_values(model={"architecture": architecture})
    model = build_model(config, input_shape=(3, size, size), seed=0)
    calibrate_batchnorm(model, images(8, size))
    return model.eval()


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_classifiers_keep_their_outputs(architecture: str) -> None:
    model = network(architecture)
    inputs = images(2)
    with torch.no_grad():
        expected = model(inputs.clone())
        pure = without_in_place(model)
        assert torch.equal(pure(inputs), expected)
        folded = fold_batchnorm(pure)(inputs)
    assert {name for name, _ in pure.named_parameters()} == {name for name, _ in model.named_parameters()}
    assert not any(getattr(layer, "inplace", False) for layer in pure.modules())
    torch.testing.assert_close(folded, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_vgg_style_layers_lose_their_in_place_flag() -> None:
    # vgg11 itself has 128 million parameters; this is its pattern.
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3600, 8), nn.ReLU(True), nn.Dropout()
    ).eval()
    assert torch.equal(without_in_place(model)(images(2)), model(images(2)))
    assert model[1].inplace, "the original must stay as it is"


def test_residual_networks_fold_completely_and_densenet_in_part() -> None:
    def remaining(architecture: str) -> list[nn.Module]:
        return [layer for layer in fold_batchnorm(network(architecture)).modules() if isinstance(layer, nn.BatchNorm2d)]

    assert remaining("resnet18") == [] and remaining("small_cnn") == []
    left = remaining("densenet121")
    assert 0 < len(left) < 121
    assert all(type(layer) is nn.BatchNorm2d and not layer.training for layer in left)


class EveryForm(nn.Module):
    """Uses each way of overwriting a tensor, and reads overwritten tensors again."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x * 2
        b = self.relu(a)
        c = b + a  # a has become relu(a)
        c += x
        c.mul_(0.5)
        d = torch.tanh(c)
        nn.functional.relu_(d)  # result dropped, d itself has changed
        e = d - 0.25
        e = nn.functional.relu(e, inplace=True) + nn.functional.leaky_relu(e, 0.1, True)
        torch.sigmoid_(e)
        e -= 0.1
        e /= 2
        return e.add_(d).clamp_(0, 1)


def test_every_in_place_form_becomes_pure() -> None:
    model = EveryForm().eval()
    inputs = torch.linspace(-2, 2, 101)
    pure = without_in_place(model)
    kept = inputs.clone()
    assert torch.equal(pure(inputs), model(inputs.clone()))
    assert torch.equal(inputs, kept)
    for node in pure.graph.nodes:
        name = node.target if isinstance(node.target, str) else node.target.__name__
        assert node.op in ("placeholder", "call_module", "output") or not name.endswith("_")
        assert not name.startswith("i") or name in ("input",)


class WritesThroughView(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.view(-1).relu_()
        return y


class WritesPart(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y[0] = 0
        return y


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "reason"),
    [(WritesThroughView(), "a view"), (WritesPart(), "cannot be traced"), (Branches(), "control flow")],
)
def test_what_cannot_be_rewritten_is_refused_with_the_reason(model: nn.Module, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        without_in_place(model)


def test_linear_layers_fold_and_shared_or_branching_inputs_do_not() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.convolution(x)
            return self.norm(y) + self.convolution(self.norm(y)) + y

    shared = Shared().eval()
    shared.norm.running_mean += 0.5
    assert torch.equal(fold_batchnorm(shared)(images(2)), shared(images(2)))
    linear = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    linear[1].running_mean += 0.5
    linear[1].running_var *= 3
    folded = fold_batchnorm(linear)
    assert len(list(folded.children())) == 1
    torch.testing.assert_close(folded(torch.eye(4)), linear(torch.eye(4)))


def test_networks_of_other_threads_work_while_one_is_traced() -> None:
    """fx patches all modules of a process: hospitals that are threads of one, as in a simulation, ended with a NameError."""
    inside, go_on = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside.set()
            assert go_on.wait(30)
            return torch.relu(x)

    other, record = nn.Linear(3, 2), torch.ones(1, 3)
    expected, seen = other(record), list[fx.GraphModule]()
    tracing = threading.Thread(target=lambda: seen.append(trace(nn.Sequential(Waits(), nn.Linear(3, 2)))))
    tracing.start()
    assert inside.wait(30)
    second = threading.Thread(target=lambda: seen.append(trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))))
    second.start()
    found = other(record)  # of this thread, in the middle of the other's tracing
    go_on.set()
    for thread in (tracing, second):
        thread.join(30)
    assert torch.equal(found, expected) and len(seen) == 2
    assert nn.Module.__call__.__qualname__ == "Module._wrapped_call_impl"
