"""Calibration: one patient moves what it is fitted with by at most 1, and what is fitted makes the model better."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.errors import DataError
from mpc_fl.learning.models.calibration import (
    SHIFTS,
    TEMPERATURES,
    Calibration,
    Fitted,
    Grid,
    candidate_offsets,
    changes,
    fit,
    patient_changes,
)

FITTED: tuple[Fitted, ...] = ("temperature", "offsets", "both")
LOGITS = st.lists(st.floats(-1e4, 1e4) | st.sampled_from([math.nan, math.inf, -math.inf]), min_size=4, max_size=4)


def singly(count: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([row]) for row in range(count))


@given(
    st.integers(2, 4), st.sampled_from(FITTED), st.lists(st.tuples(LOGITS, st.integers(0, 9)), min_size=1, max_size=6)
)
def test_a_patient_has_norm_1_at_most_whatever_the_records(
    classes: int, fitted: Fitted, records: list[tuple[list[float], int]]
) -> None:
    logits = torch.tensor([row[:classes] for row, _ in records], dtype=torch.float32)
    labels = torch.tensor([label % classes for _, label in records])
    grid = Grid(classes, fitted)
    rows = patient_changes(grid, logits, labels, (torch.arange(len(records)),))
    assert rows.shape == (1, grid.length) and rows.dtype == torch.float32
    assert float(rows.double().norm()) <= 1 + 1e-6  # `add_patients` clips at 1 exactly


def test_offsets_of_two_classes_are_never_clipped() -> None:
    grid = Grid(2, "offsets")
    logits = torch.linspace(-5, 5, 301)[:, None] * torch.tensor([[0.5, -0.5]])
    for label in (0, 1):
        labels = torch.full((301,), label)
        rows = patient_changes(grid, logits, labels, singly(301))
        torch.testing.assert_close(rows.double() * grid.scales()[0], changes(grid, logits, labels), atol=1e-6, rtol=0)


def drawn(sharpness: float, records: int = 4000, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are `sharpness` times too sure of labels drawn by them."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(records, classes, generator=generator)
    labels = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator).squeeze(1)
    return sharpness * logits, labels


@pytest.mark.parametrize(("sharpness", "between"), [(1.0, (0.84, 1.2)), (4.0, (3.3, 4.8)), (0.5, (0.49, 0.6))])
def test_the_temperature_undoes_too_much_certainty(sharpness: float, between: tuple[float, float]) -> None:
    (logits, labels), grid = drawn(sharpness), Grid(3, "temperature")
    total = patient_changes(grid, logits, labels, singly(len(labels))).double().sum(dim=0)
    found = fit(grid, total, torch.ones(3).double(), 0.0)
    assert between[0] <= found.temperature <= between[1] and found.offsets == (0.0, 0.0, 0.0)
    assert torch.equal(found.decided(logits), logits.argmax(dim=1))


@pytest.mark.parametrize("classes", [2, 3])
def test_offsets_raise_the_criterion_as_much_as_any_of_the_grid(classes: int) -> None:
    logits, labels = drawn(1.0, classes=classes)
    logits[:, -1] -= 1.5  # a class that is overlooked
    grid, counts = Grid(classes, "offsets"), torch.bincount(labels, minlength=classes).double()
    total = patient_changes(grid, logits, labels, singly(len(labels))).double().sum(dim=0)
    found = fit(grid, total, 1 / (counts * classes), 0.0)

    def balanced(offsets: torch.Tensor) -> float:
        right = ((logits + offsets).argmax(dim=1) == labels).double()
        return float(torch.stack([right[labels == label].mean() for label in range(classes)]).mean())

    values = [balanced(offsets) for offsets in candidate_offsets(classes)]
    assert balanced(torch.tensor(found.offsets)) >= max(values) - (0.0 if classes == 2 else 0.01)
    assert max(values) > balanced(torch.zeros(classes)) + 0.02
    assert torch.equal(found.decided(logits), (logits + torch.tensor(found.offsets)).argmax(dim=1))


def test_noise_alone_changes_nothing() -> None:
    generator, grid = torch.Generator().manual_seed(1), Grid(3, "both")
    changed = 0
    for _ in range(200):
        noise = 5.0 * torch.randn(grid.length, dtype=torch.float64, generator=generator)
        changed += fit(grid, noise, torch.full((3,), 1 / 300).double(), 5.0) != Calibration.none(3)
    assert changed < 8  # about one time in a hundred


def test_the_grid_says_what_it_moves() -> None:
    grid = candidate_offsets(3)
    assert len(grid) == 3 * len(SHIFTS) and 1.0 not in TEMPERATURES
    assert bool(((grid != 0).sum(dim=1) == 1).all()) and grid.abs().sum(dim=1).tolist() == sorted(
        grid.abs().sum(dim=1).tolist()
    )
    assert bool((candidate_offsets(2)[:, 0] == 0).all())


@pytest.mark.parametrize(
    "values", [None, {}, {"temperature": 0.0, "offsets": [0.0]}, {"temperature": 1.0, "offsets": []},
               {"temperature": "x", "offsets": [0]}, {"temperature": 1.0, "offsets": [math.nan]}]
)  # fmt: skip
def test_what_cannot_be_a_calibration_is_refused(values: object) -> None:
    with pytest.raises(DataError):
        Calibration.from_json(values)


def test_there_and_back() -> None:
    calibration = Calibration(1.5, (0.0, -0.5, 2.0))
    assert Calibration.from_json(calibration.to_json()) == calibration == Calibration.of_tensor(calibration.tensor())
    logits = torch.tensor([[1.0, 2.0, -1.0]])
    torch.testing.assert_close(calibration.probabilities(logits), torch.softmax(logits / 1.5, dim=1))
    assert calibration.decided(logits).tolist() == [1] and Calibration(1.0, (0.0, -0.5, 3.0)).decided(
        logits
    ).tolist() == [2]
