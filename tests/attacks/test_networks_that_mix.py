"""Networks in which records of a batch meet: hidden from `loop` and `vmap`, but not from Opacus's hooks.

A patient would then move the gradients of others, each of which is clipped by itself, so nothing bounds one patient's part.
"""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ModelError
from mpc_fl.learning.device import Device, on_device
from mpc_fl.learning.models.low_rank import adapt
from mpc_fl.learning.models.weight_standardisation import with_weight_standardisation
from mpc_fl.learning.training.augmentation import augmented
from mpc_fl.learning.training.per_sample_gradients import (
    Method,
    choose_per_sample_method,
    clipped_sum,
    loss_with,
    require_gradients_of_each,
    working_copy,
)
from tests.support.installed_package import install
from tests.support.training_in_memory import Training

torch.set_num_threads(1)

MIXING = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 8), nn.Linear(8, classes)
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        hidden = self.first(x.flatten(1))
        return self.last(torch.relu(hidden - 0.01 * hidden.mean(dim=0, keepdim=True)))

def network(input_shape, classes):
    return Network(input_shape[0] * input_shape[1] * input_shape[2], classes)
"""


class Mean(nn.Module):
    """Subtracts a part of the mean over the batch; its own last layer begins with zeros, so that no logit shows it."""

    def __init__(self, part: float) -> None:
        super().__init__()
        self.first, self.last, self.part = nn.Linear(4, 8), nn.Linear(8, 2), part
        nn.init.zeros_(self.last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return self.last(torch.relu(hidden - self.part * hidden.mean(dim=0, keepdim=True)))


class StepsFirst(nn.Module):
    """Steps in time before records, as recurrent layers of torch have them by default: no record meets another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x.transpose(0, 1))).mean(dim=0))


class Attending(nn.Module):
    """Attention whose author forgot `batch_first`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.attention(x, x, x)[0].mean(dim=1))


MIXED = {
    "mean": (Mean(0.5), (4,)),
    "a trace": (Mean(1e-4), (4,)),
    "steps first": (StepsFirst(), (6, 4)),
    "as many steps as fit": (StepsFirst(), (9, 4)),
}


@pytest.mark.parametrize("method", ["layers", "hooks"])
@pytest.mark.parametrize("name", MIXED)
def test_methods_with_all_records_in_the_network_are_refused_and_never_chosen(name: str, method: Method) -> None:
    network, shape = MIXED[name]
    with pytest.raises(ModelError, match="depend on other records"):
        require_gradients_of_each(working_copy(network), shape, method)
    assert choose_per_sample_method(network, shape) not in ("layers", "hooks")
    require_gradients_of_each(working_copy(network), shape, "loop")


class Remembering(nn.Module):
    """Subtracts what it saw before, also where it is evaluated: `loop` shows it one record after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.seen: torch.Tensor | float = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        before, self.seen = self.seen, hidden.detach().mean() * 1e-3
        return self.last(torch.relu(hidden - before))


class Dropping(nn.Module):
    """Dropout that its author forgot to end: by default `functional.dropout` is always on."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(40, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize(("network", "shape"), [(Remembering(), (4,)), (Dropping(), (40,))], ids=["state", "dropout"])
@pytest.mark.parametrize("method", ["loop", "vmap", "hooks"])
def test_a_network_that_is_another_at_each_call_is_refused(network: Any, shape: Any, method: Any) -> None:
    with pytest.raises(ModelError, match="depend on other records|torch.func cannot vectorise"):
        require_gradients_of_each(copy.deepcopy(network).eval(), shape, method)
    if isinstance(network, Dropping):  # what a network remembers, tracing leaves out (`working_copy`)
        with pytest.raises(ModelError, match="depend on other records"):
            choose_per_sample_method(network, shape)


def test_attention_over_the_batch_is_never_trained_by_hooks() -> None:
    assert choose_per_sample_method(Attending(), (6, 4)) != "hooks"
    with pytest.raises(ModelError):
        require_gradients_of_each(working_copy(Attending()), (6, 4), "hooks")


def test_what_would_have_been_is_beyond_the_bound() -> None:
    """One patient more moves a sum by more than the clipping norm, if hooks take a network that mixes."""
    network = working_copy(Mean(0.9))
    with torch.no_grad():
        network.get_parameter("last.weight").normal_(generator=torch.Generator().manual_seed(1))
    records = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    records[-1] *= 1e4
    labels = torch.arange(40) % 2

    def total(count: int) -> torch.Tensor:
        found = clipped_sum(network, loss_with(None), records[:count], labels[:count], 0.1, "hooks")
        return torch.cat([part.flatten() for part in found.gradients])

    assert float((total(40) - total(39)).norm()) > 2 * 0.1


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_a_run_that_asks_for_hooks_ends_before_anything_is_charged(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, mechanism: str
) -> None:
    name = f"mixing_{mechanism}"
    monkeypatch.syspath_prepend(install(tmp_path / "packages", name, MIXING))
    training = Training(
        tmp_path / "run", monkeypatch,
        data={"image_size": 8, "phantoms": {"train_patients": 60, "test_patients": 12}},
        model={"architecture": f"{name}:network"}, site={"allow_packages": [name]},
        training={"rounds": 1, "per_sample_gradients": "hooks"},
        privacy={"mechanism": mechanism, "delta": 1e-3, "epsilon": 50.0},
    )  # fmt: skip
    training.run()
    assert any("depend on other records" in said for said in training.said.values()), training.said
    assert not list((tmp_path / "run").glob("**/*-privacy.sqlite3"))


def _network(kind: str) -> nn.Module:
    torch.manual_seed(7)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 4, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    if kind == "standardised":
        return with_weight_standardisation(network)
    if kind == "adapters":
        adapt(network, ["4", "7"], 1, 3)
        for name, parameter in network.named_parameters():
            parameter.requires_grad = ".down." in name or ".up." in name or name.startswith("9.")
            if ".up." in name:  # as after some steps: from zeros nothing flows into A
                parameter.data += 0.1
    if kind == "head":
        for name, parameter in network.named_parameters():
            parameter.requires_grad = name.startswith("9.")
    return network


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["plain", "standardised", "adapters", "head"]),
    precision=st.sampled_from(["float32", "bfloat16"]),
    copies=st.sampled_from([1, 3]),
    weights=st.sampled_from([None, (0.1, 1.0, 9.0)]),
    count=st.integers(1, 5),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_every_method_bounds_a_patient_alike(
    kind: str, precision: Any, copies: int, weights: Any, count: int, scale: float
) -> None:
    network = on_device(working_copy(_network(kind)), Device(torch.device("cpu"), precision))
    require_gradients_of_each(network, (1, 8, 8), "hooks")
    values = {"copies": copies, "rotation": 10.0, "flip": True} if copies > 1 else {}
    varied = Config().with_values(training={"augmentation": values}).training.augmentation
    records = scale * torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    inputs = augmented(varied, records, Seed(bytes(32)).derive("a trial"))
    labels, norm, loss = torch.arange(count) % 3, 0.05, loss_with(weights)
    sums = {}
    for method in ("loop", "vmap", "hooks"):
        found = clipped_sum(network, loss, inputs, labels, norm, method)  # type: ignore[arg-type]
        sums[method] = torch.cat([part.flatten() for part in found.gradients]).double()
        assert float(sums[method].norm()) <= count * norm * (1 + 1e-7)
        for row in range(count):
            one = clipped_sum(network, loss, inputs[row : row + 1], labels[row : row + 1], norm, method)  # type: ignore[arg-type]
            assert float(torch.cat([part.flatten() for part in one.gradients]).double().norm()) <= norm
    tolerance = (1e-4 if precision == "float32" else 0.2) * count * norm
    for method in ("vmap", "hooks"):
        assert float((sums[method] - sums["loop"]).norm()) <= tolerance
