"""However many patients a step draws, only so many records are in the network at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpc_fl.config.config import Config
from mpc_fl.config.training import AugmentationSection
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.privacy.distributed_gaussian import MechanismTerms, plan_mechanism
from mpc_fl.learning.training import batch_pieces
from mpc_fl.learning.training.augmentation import Inputs, augmented
from mpc_fl.learning.training.batch_pieces import pieces_of
from mpc_fl.learning.training.dp_sgd import _mean_gradient
from mpc_fl.learning.training.per_sample_gradients import (
    Method,
    clipped_sum,
    rounded_sum,
    sum_cross_entropy,
    working_copy,
)

torch.set_num_threads(1)
SIDE, AT_ONCE = 8, 10
METHODS: list[Method] = ["loop", "vmap", "hooks"]


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(batch_pieces, "_RECORD_BYTES", AT_ONCE * 4 * SIDE * SIDE)
    yield


class LargestConvolution(TorchDispatchMode):
    """How many records the largest convolution of the network's first layer was asked for, however they were batched."""

    def __init__(self) -> None:
        super().__init__()
        self.records = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution.default and args[0].shape[-1] == SIDE:
            self.records = max(self.records, args[0].numel() // (SIDE * SIDE))
        return function(*args, **(kwargs or {}))


def network() -> nn.Module:
    config = Config().with_values(model={"normalisation": "group"})
    return working_copy(build_model(config, input_shape=(1, SIDE, SIDE), seed=0))


def batch(count: int, copies: int) -> tuple[Inputs, torch.Tensor]:
    records = torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    section = AugmentationSection(copies=copies, flip=copies > 1, contrast=0.1 * (copies > 1))
    return augmented(section, records, Seed.from_system()), torch.arange(count) % 3


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("copies", [1, 4, 17])
@pytest.mark.parametrize("method", METHODS)
def test_a_private_batch_of_any_size_passes_in_pieces(method: Method, copies: int) -> None:
    model, (inputs, labels) = network(), batch(60 if copies < 10 else 3, copies)
    with LargestConvolution() as seen:
        clipped_sum(model, sum_cross_entropy, inputs, labels, 1.0, method)
    assert 0 < seen.records <= AT_ONCE


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("method", METHODS)
def test_a_rounded_batch_too(method: Method) -> None:
    model, (inputs, labels) = network(), batch(60, 3)
    size = sum(parameter.numel() for parameter in model.parameters())
    mechanism = plan_mechanism(MechanismTerms(size, 3, 1, 60, 1.0, 1.0), ring_bits=64)
    with LargestConvolution() as seen:
        rounded_sum(model, sum_cross_entropy, inputs, labels, mechanism, method)
    assert 0 < seen.records <= AT_ONCE


@pytest.mark.parametrize("copies", [1, 4, 17])
def test_a_plain_batch_too_with_the_gradient_of_the_whole(copies: int) -> None:
    model, (inputs, labels) = network(), batch(60, copies)
    with LargestConvolution() as seen:
        loss = _mean_gradient(model, sum_cross_entropy, inputs, labels)
    assert 0 < seen.records <= AT_ONCE
    every, labels_of_all = (torch.cat(tensors) for tensors in zip(*pieces_of(inputs, labels), strict=True))
    assert len(every) == 60 * copies
    value = sum_cross_entropy(model(every), labels_of_all) / copies
    expected = torch.autograd.grad(value / 60, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert loss == pytest.approx(float(value.detach()), rel=1e-5)


def test_the_bound_itself_is_one_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert batch_pieces.copies_at_once(torch.empty(1, 3, 224, 224)) == 13
    assert batch_pieces.copies_at_once(torch.empty(1, 1, 64, 64)) == 512
    assert batch_pieces.copies_at_once(torch.empty(1, 30000, 30000, device="meta")) == 1
