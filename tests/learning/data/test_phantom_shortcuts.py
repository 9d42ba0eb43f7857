"""Shortcuts put into phantoms: who bears the mark, where it lies, what a site's films look like, and nothing of it by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ConfigError
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.phantom_shortcuts import corner_side, mark_pixels


def config(patients: int = 240, **shortcut: Any) -> Config:
    sizes = {"train_patients": patients, "test_patients": 60}
    return parse_config({"data": {"image_size": 16, "phantoms": {**sizes, "shortcut": shortcut}}}, "test")


def bearing(images: torch.Tensor) -> torch.Tensor:
    """Which films have the mark, bool (N,)."""
    return (images[:, 0][:, torch.from_numpy(mark_pixels(16))] == 1).all(dim=1)


@pytest.mark.parametrize("size", [8, 9, 16, 31, 32, 64, 224, 512])
def test_the_mark_lies_within_its_corner(size: int) -> None:
    pixels, side = mark_pixels(size), corner_side(size)
    assert pixels.any() and not pixels[side:].any() and not pixels[:, side:].any()
    assert pixels.sum() < side * side  # a letter, no square
    assert pixels.any(axis=1).sum() == pixels.any(axis=0).sum() >= 2


def test_no_film_is_changed_without_a_shortcut() -> None:
    plain, marked = load_hospital(config(), 1, "train"), load_hospital(config(site=0, elsewhere=0.0), 1, "train")
    assert torch.equal(plain.inputs, marked.inputs) and not bearing(plain.inputs).any()


def test_the_mark_goes_with_the_diagnosis_at_one_site_and_with_nothing_elsewhere() -> None:
    of = config(900, site=1, diagnosis=2, probability=0.9, elsewhere=0.3)
    for rank in range(3):
        films = load_hospital(of, rank, "train")
        marks = bearing(films.inputs)
        for label in range(3):
            expected = 0.3 if rank != 1 else (0.9 if label == 2 else 0.1)
            assert float(marks[films.labels == label].float().mean()) == pytest.approx(expected, abs=0.13)
        for rows in films.records_of_patient:
            assert len(set(marks[rows].tolist())) == 1  # all films of a patient, or none
        unmarked = load_hospital(config(900), rank, "train").inputs
        hidden = torch.from_numpy(mark_pixels(16))
        assert torch.equal(films.inputs[..., ~hidden], unmarked[..., ~hidden])


def test_tests_have_the_mark_too() -> None:
    films = load_hospital(config(site=0, probability=1.0, elsewhere=0.0), 0, "test")
    assert torch.equal(bearing(films.inputs), films.labels == 1)


def test_a_style_tells_sites_apart_and_keeps_films_in_range() -> None:
    contrasts, grains, plainly = list[float](), list[float](), list[float]()
    for rank in range(3):
        films, plain = (load_hospital(of, rank, "train").inputs for of in (config(style=1.0), config()))
        assert films.dtype == torch.float32 and films.min() >= 0 and films.max() <= 1
        contrasts.append(float((films.std() / plain.std()).item()))
        grains.append(float((films - films.roll(1, -1)).abs().mean()))
        plainly.append(float(plain.std()))
    assert torch.equal(films, load_hospital(config(style=1.0), 2, "train").inputs)  # the same each time
    assert contrasts == sorted(contrasts) and contrasts[0] < 0.7 < 1.15 < contrasts[2]
    assert grains == sorted(grains) and grains[2] > 2 * grains[0]
    assert max(plainly) - min(plainly) < 0.02


def test_a_shortcut_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="site is 3, and there are 3 hospitals"):
        load_hospital(config(site=3), 0, "train")
    with pytest.raises(ConfigError, match="number of one of data.classes"):
        parse_config({"data": {"classes": ["a", "b"], "phantoms": {"shortcut": {"diagnosis": 2}}}}, "test")
    with pytest.raises(ConfigError, match="phantoms alone"):
        parse_config({"data": {"source": "breast_cancer", "phantoms": {"shortcut": {"site": 0}}}}, "test")
