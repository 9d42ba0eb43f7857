"""The trial of a device with public records: it passes where rows are independent, and finds where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpc_fl.config.config import parse_config
from mpc_fl.errors import ModelError
from mpc_fl.learning.device import CPU, Device, device_of, on_device
from mpc_fl.learning.training.independent_records import require_independent_records
from mpc_fl.learning.training.per_sample_gradients import Method
from tests.learning.training.test_exact_sensitivity import mechanism_for, network

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
CASES: list[tuple[str, tuple[int, ...], Method]] = [
    ("small_cnn", (1, 32, 32), "vmap"),
    ("small_cnn", (1, 32, 32), "loop"),
    ("mlp", (30,), "hooks"),
]


def device_named(name: str) -> Device:
    if name == "cpu":
        return CPU
    return device_of(parse_config({"site": {"device": name}, "privacy": {"mechanism": "distributed"}}, "test"))


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=no_gpu)])
@pytest.mark.parametrize(("architecture", "shape", "method"), CASES, ids=lambda value: str(value))
def test_independent_rows_pass(name: str, architecture: str, shape: tuple[int, ...], method: Method) -> None:
    model, _ = network(architecture, "frozen", shape, seed=3)
    require_independent_records(on_device(model, device_named(name)), shape, mechanism_for(model), method)


class Wavering(nn.Module):
    """A network that rounds otherwise from call to call, as one does whose kernels are chosen by what memory is free."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits with a relative error of some 1e-5."""
        self.calls += 1
        return self.network(inputs) * (1 + 1e-5 * (self.calls % 3))


def test_a_network_that_rounds_otherwise_from_batch_to_batch_is_refused() -> None:
    model, _ = network("mlp", "frozen", (30,), seed=3)
    with pytest.raises(ModelError, match="would hide nobody: set site.device to cpu"):
        require_independent_records(Wavering(model), (30,), mechanism_for(model), "loop")
