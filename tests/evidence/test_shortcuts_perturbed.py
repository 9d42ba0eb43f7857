"""Films changed on purpose: what is hidden is hidden, the rest stays, and forms and ranges with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpc_fl.evidence.shortcuts_perturbed import (
    PERTURBATIONS,
    Films,
    blurred,
    borders,
    corners,
    hidden,
    lung_fields,
    replaced,
    widened,
)
from mpc_fl.learning.data.phantom_shortcuts import mark_pixels
from mpc_fl.learning.data.phantoms import make_phantoms

BY_NAME = {change.name: change for change in PERTURBATIONS}


def phantoms(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    made = make_phantoms(30, 3, size, 3, "test")
    return torch.from_numpy(made.images)[:, None], torch.from_numpy(made.lungs)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
@pytest.mark.parametrize("name", list(BY_NAME))
def test_every_change_keeps_form_and_range_and_does_something(name: str, size: int) -> None:
    images, lungs = phantoms(size)
    before = images.clone()
    labels = torch.arange(len(images)) % 3
    found = BY_NAME[name].of(Films(images.expand(-1, 3, -1, -1), lungs, labels))
    assert found.shape == (len(images), 3, size, size) and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1 and torch.equal(images, before)
    assert float((found - images).abs().mean()) > 1e-3
    assert torch.equal(found[:, 0], found[:, 2])


@pytest.mark.parametrize("size", [8, 16, 32, 64, 224])
def test_removed_corners_take_the_mark_along_and_leave_the_lungs(size: int) -> None:
    assert not bool((torch.from_numpy(mark_pixels(size)) & ~corners(size)).any())
    assert int(corners(size).sum()) == 4 * int(corners(size)[: size // 2, : size // 2].sum())
    assert 0.05 < float(corners(size).float().mean()) < 0.27


def test_what_is_hidden_is_one_grey_and_the_rest_stays() -> None:
    images, lungs = phantoms()
    for regions in (lungs, corners(32), borders(32)):
        found = hidden(images, regions)
        where = regions.expand(len(images), 32, 32)[:, None]
        assert len(torch.unique(found[where])) == 1 and torch.equal(found[~where], images[~where])
        assert float(found[where][0]) == pytest.approx(float(images[where].mean()), abs=1e-5)
    assert torch.equal(hidden(images, torch.zeros(32, 32, dtype=torch.bool)), images)


@pytest.mark.parametrize("alike", [True, False])
def test_what_is_replaced_is_that_of_a_film_of_the_same_class_or_of_another(alike: bool) -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2])
    images = torch.arange(10.0)[:, None, None, None].expand(10, 1, 16, 16)
    films = Films(images, torch.zeros(10, 16, 16, dtype=torch.bool), labels)
    found = replaced(films, corners(16), alike)
    given = found[:, 0, 0, 0].long()
    assert bool(((labels[given] == labels) == alike).all()) and not bool((given == torch.arange(10)).any())
    assert torch.equal(found[..., ~corners(16)], images[..., ~corners(16)])
    assert torch.equal(found, replaced(films, corners(16), alike))
    if alike:
        assert sorted(given.tolist()) == list(range(10))  # each gives to one
    one_class = Films(images, films.lungs, torch.zeros(10, dtype=torch.int64))
    assert torch.equal(replaced(one_class, corners(16), False), images)


def test_masked_lungs_hold_all_that_tells_the_diagnoses() -> None:
    # The same numbers draw both: what differs is the diagnosis, and the exposure that follows from it.
    one, other = (make_phantoms(60, classes, 32, 5, "test") for classes in (2, 3))
    assert np.array_equal(one.lungs, other.lungs)
    masked = widened(torch.from_numpy(one.lungs)).numpy()
    assert 0.2 < masked.mean() < 0.6
    moved = np.abs(one.images - other.images)[one.labels != other.labels]
    of = masked[one.labels != other.labels]
    assert len(moved) and moved[~of].mean() < 0.3 * moved[of].mean()


def test_fixed_fields_are_two_over_the_central_two_thirds() -> None:
    fields = lung_fields(60)
    rows, columns = fields.any(dim=1), fields.any(dim=0)
    assert rows.nonzero().flatten().tolist() == list(range(10, 50))
    assert torch.equal(fields, fields.flip(1)) and not bool(columns[29:31].any()) and bool(columns[10])
    assert 0.45 < float(fields.float().mean()) < 0.55


def test_a_blur_keeps_the_mean_of_a_grey_film_and_flattens_grain() -> None:
    assert torch.allclose(blurred(torch.full((2, 1, 16, 16), 0.3)), torch.tensor(0.3))
    grain = torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert float(blurred(grain).std()) < 0.3 * float(grain.std())
