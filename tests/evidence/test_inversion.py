"""Gradient inversion finds small images in plaintext gradients, and nothing in what does not depend on them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpc_fl.evidence.inversion import Search, gradients_of, inverted, label_seen, total_variation
from mpc_fl.evidence.similarity import probability_at_chance, similarities
from mpc_fl.learning.data.phantoms import make_phantoms

FORM, QUICK = (1, 8, 8), Search(steps=150, variation=0.02)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 3))


def phantoms(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = make_phantoms(count, 3, 8, 5, "test")
    return torch.from_numpy(made.images)[:count, None], torch.from_numpy(made.labels)[:count]


def test_gradients_are_those_of_each_image_alone_in_the_order_of_parameters() -> None:
    model, (images, labels) = network(), phantoms(3)
    found = gradients_of(model)(images, labels)
    for row, image, label in zip(found, images, labels, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), label[None])
        of_loss = torch.autograd.grad(loss, list(model.parameters()))
        assert torch.allclose(row, torch.cat([piece.reshape(-1) for piece in of_loss]), atol=1e-6)


def test_the_label_is_read_off_the_last_offsets_whatever_the_scale() -> None:
    model, (images, labels) = network(), phantoms(9)
    seen = gradients_of(model)(images, labels)
    assert [label_seen(model, 1e-3 * row) for row in seen] == labels.tolist()
    with pytest.raises(ValueError, match="no offsets"):
        label_seen(nn.Sequential(nn.Flatten(), nn.Linear(64, 3, bias=False)), torch.zeros(192))


def test_total_variation_of_stripes_and_of_nothing() -> None:
    stripes = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1, 1, 4, 4)
    assert total_variation(stripes).tolist() == [1.0]
    assert total_variation(torch.full((2, 1, 4, 4), 0.3)).tolist() == [0.0, 0.0]


def test_images_are_found_in_their_gradients_and_not_in_words_that_mask_them() -> None:
    model, (images, labels) = network(), phantoms(24)
    seen = gradients_of(model)(images[:6], labels[:6])
    words = torch.randint(-(2**31), 2**31, seen.shape, generator=torch.Generator().manual_seed(1)).double()
    found = inverted(model, torch.cat([0.01 * seen.double(), words]), FORM, QUICK)
    assert found.shape == (12, *FORM) and float(found.min()) >= 0 and float(found.max()) <= 1
    common = torch.from_numpy(make_phantoms(200, 3, 8, 6, "public").images).mean(0)[None]
    plain, masked = similarities(found[:6], images, common), similarities(found[6:], images, common)
    assert float(plain.diagonal().mean()) > 0.8 and probability_at_chance(plain) < 1e-3
    assert abs(float(masked.diagonal().mean())) < 0.3 and probability_at_chance(masked) > 0.05


def test_a_gradient_of_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters"):
        inverted(network(), torch.zeros(1, 10), FORM, QUICK)
