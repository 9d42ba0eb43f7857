"""With distributed noise a patient's part of a sum is that patient's alone, bit for bit, whoever else is drawn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpc_fl.config.config import Config
from mpc_fl.config.training import AugmentationSection
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.privacy.distributed_gaussian import (
    DistributedGaussian,
    MechanismTerms,
    add_patients,
    plan_mechanism,
)
from mpc_fl.learning.training.augmentation import augmented
from mpc_fl.learning.training.per_sample_gradients import Method, rounded_sum, sum_cross_entropy, working_copy

CASES: list[tuple[str, str, tuple[int, ...], Method]] = [
    ("small_cnn", "frozen", (1, 32, 32), "vmap"),
    ("small_cnn", "group", (1, 32, 32), "vmap"),
    ("small_cnn", "frozen", (1, 64, 64), "vmap"),
    ("small_cnn", "group", (1, 32, 32), "hooks"),
    ("small_cnn", "frozen", (1, 32, 32), "layers"),
    ("small_cnn", "frozen", (1, 64, 64), "layers"),
    ("mlp", "frozen", (30,), "layers"),
    ("small_cnn", "frozen", (1, 32, 32), "loop"),
    ("mlp", "frozen", (30,), "vmap"),
    ("mlp", "frozen", (30,), "hooks"),
    ("mlp", "frozen", (30,), "loop"),
]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def network(architecture: str, normalisation: str, shape: tuple[int, ...], seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A network with weights of `seed`, and 16 records for it, some of them of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    records = torch.randn(16, *shape, generator=generator) * torch.logspace(-2, 1, 16).reshape(-1, *(1 for _ in shape))
    settings = {"model": {"architecture": architecture, "normalisation": normalisation}}
    model = build_model(Config().with_values(**settings), input_shape=shape, seed=seed)
    calibrate_batchnorm(model, records)
    return working_copy(model), records


def mechanism_for(model: nn.Module, norm: float = 0.5) -> DistributedGaussian:
    return plan_mechanism(MechanismTerms(len(flatten_parameters(model)), 3, 1, 64, norm, 1.0), ring_bits=64)


@pytest.mark.parametrize(("architecture", "normalisation", "shape", "method"), CASES, ids=lambda value: str(value))
def test_a_sum_is_that_of_its_patients_alone(
    architecture: str, normalisation: str, shape: tuple[int, ...], method: Method
) -> None:
    model, records = network(architecture, normalisation, shape, seed=3)
    labels = torch.arange(len(records)) % 3 if architecture != "mlp" else torch.arange(len(records)) % 2
    mechanism = mechanism_for(model)

    def total(rows: list[int]) -> torch.Tensor:
        chosen = torch.tensor(rows, dtype=torch.int64)
        return rounded_sum(model, sum_cross_entropy, records[chosen], labels[chosen], mechanism, method).total

    alone = [total([row]) for row in range(len(records))]
    everybody = list(range(len(records)))
    assert all(int(part.abs().sum()) for part in alone)
    for rows in (everybody, everybody[::-1], everybody[:-1], everybody[::3], [5, 5, 7, 5]):
        assert torch.equal(total(rows), torch.stack([alone[row] for row in rows]).sum(dim=0))


def test_a_sum_is_that_of_its_patients_alone_with_two_threads(two_threads: None) -> None:
    test_a_sum_is_that_of_its_patients_alone("small_cnn", "frozen", (1, 32, 32), "vmap")


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(CASES),
    st.integers(0, 1000),
    st.lists(st.integers(0, 15), min_size=2, max_size=16, unique=True),
    st.data(),
)
def test_removing_and_reordering_patients_leaves_the_others_digits(
    case: tuple[str, str, tuple[int, ...], Method], seed: int, rows: list[int], data: st.DataObject
) -> None:
    architecture, normalisation, shape, method = case
    model, records = network(architecture, normalisation, shape, seed)
    labels, mechanism = torch.zeros(len(records), dtype=torch.int64), mechanism_for(model)
    removed = data.draw(st.sampled_from(rows))
    others = data.draw(st.permutations([row for row in rows if row != removed]))

    def total(chosen: list[int]) -> torch.Tensor:
        return rounded_sum(model, sum_cross_entropy, records[chosen], labels[chosen], mechanism, method).total

    moved = total(rows) - total(list(others))
    assert torch.equal(moved, total([removed]))
    assert float(moved.double().norm()) <= mechanism.sensitivity


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(0, 10**6))
def test_what_a_row_adds_depends_on_that_row_alone(count: int, size: int, seed: int) -> None:
    """`add_patients` itself, also for patients' feature sums. On the old code norms depended on the number of rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, generator=generator) * 100
    mechanism = plan_mechanism(MechanismTerms(size, 3, 1, 64, 1.0, 1.0), ring_bits=64)
    together = torch.zeros(size, dtype=torch.int64)
    norms = add_patients(mechanism, together, [rows])
    alone = torch.zeros(size, dtype=torch.int64)
    own = [add_patients(mechanism, alone, [row.unsqueeze(0).clone()]) for row in rows]
    assert torch.equal(together, alone) and torch.equal(norms, torch.cat(own))


AUGMENTED: list[tuple[str, tuple[int, ...], Method]] = [
    ("frozen", (1, 32, 32), "vmap"),
    ("group", (1, 16, 16), "hooks"),
    ("frozen", (1, 32, 32), "layers"),
    ("frozen", (1, 32, 32), "loop"),
]


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from(AUGMENTED),
    st.integers(0, 1000),
    st.lists(st.integers(0, 15), min_size=2, max_size=10, unique=True),
    st.data(),
)
def test_augmented_patients_leave_the_others_digits_too(
    case: tuple[str, tuple[int, ...], Method], seed: int, rows: list[int], data: st.DataObject
) -> None:
    normalisation, shape, method = case
    model, records = network("small_cnn", normalisation, shape, seed)
    mechanism, labels = mechanism_for(model), torch.arange(16) % 3
    section = AugmentationSection(copies=data.draw(st.integers(1, 5)), flip=True, shift=0.1, rotation=10, contrast=0.2)
    removed = data.draw(st.sampled_from(rows))
    others = data.draw(st.permutations([row for row in rows if row != removed]))

    def total(chosen: list[int]) -> torch.Tensor:
        inputs = augmented(section, records[chosen], Seed(bytes(32)))
        return rounded_sum(model, sum_cross_entropy, inputs, labels[chosen], mechanism, method).total

    moved = total(rows) - total(list(others))
    assert int(moved.abs().sum()) and torch.equal(moved, total([removed]))
    assert float(moved.double().norm()) <= mechanism.sensitivity


def test_norms_and_losses_are_in_the_order_of_the_records() -> None:
    model, records = network("small_cnn", "frozen", (1, 32, 32), seed=1)
    labels, mechanism = torch.arange(len(records)) % 3, mechanism_for(model)
    by_loop = rounded_sum(model, sum_cross_entropy, records, labels, mechanism, "loop")
    by_vmap = rounded_sum(model, sum_cross_entropy, records, labels, mechanism, "vmap")
    assert torch.allclose(by_loop.norms, by_vmap.norms, rtol=1e-4)
    assert torch.allclose(by_loop.losses, by_vmap.losses, rtol=1e-4)
    assert by_loop.norms.argsort().tolist() != list(range(len(records)))
    none = rounded_sum(model, sum_cross_entropy, records[:0], labels[:0], mechanism, "vmap")
    assert int(none.total.abs().sum()) == 0 and len(none.norms) == len(none.losses) == 0
