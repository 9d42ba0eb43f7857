"""Similarity counts what sets an image apart, and chance is told from more than chance."""

from __future__ import annotations

import pytest
import torch

from mpc_fl.evidence.similarity import probability_at_chance, similarities
from mpc_fl.learning.data.phantoms import make_phantoms


def phantoms(count: int) -> torch.Tensor:
    return torch.from_numpy(make_phantoms(count, 3, 16, 1, "test").images)[:count, None]


def test_an_image_is_like_itself_in_other_brightness_and_contrast_and_unlike_others() -> None:
    images, common = phantoms(30), phantoms(300).mean(0)
    found = similarities(0.3 * images + 0.4, images, common)
    assert found.diagonal().tolist() == pytest.approx([1.0] * 30)
    assert abs(float((found.sum() - found.diagonal().sum()) / (30 * 29))) < 0.1
    negative = similarities(1 - images, images, common)
    assert negative.diagonal().tolist() == pytest.approx([-1.0] * 30)


def test_a_chest_in_general_is_like_nobodys() -> None:
    images, common = phantoms(5), phantoms(300).mean(0)
    assert similarities(common[None], images, common).abs().max() < 1e-6
    assert similarities(torch.full_like(common, 0.4)[None], images, common).abs().max() < 1e-6


def test_places_say_whether_reconstructions_are_of_their_own_images() -> None:
    of_pairs = torch.rand(8, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert 0.05 < probability_at_chance(of_pairs) < 0.95
    of_pairs[range(8), range(8)] = 2.0
    assert probability_at_chance(of_pairs) < 1e-5
    of_pairs[range(8), range(8)] = -2.0
    assert probability_at_chance(of_pairs) > 1 - 1e-5
    assert probability_at_chance(torch.zeros(8, 40)) == pytest.approx(0.5)


def test_chance_is_rejected_as_often_as_the_level_says() -> None:
    """Of 1000 between 25 and 80, where about 50 are expected."""
    generator = torch.Generator().manual_seed(2)
    found = [probability_at_chance(torch.rand(8, 40, generator=generator)) for _ in range(1000)]
    assert 25 <= sum(value < 0.05 for value in found) <= 80


@pytest.mark.parametrize("shape", [(0, 3), (4, 3), (1, 1)])
def test_what_has_nothing_to_compare_with_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="others"):
        probability_at_chance(torch.zeros(shape))
