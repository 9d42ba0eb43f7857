"""Scattering without complex numbers is scattering, for every size of image, in whole batches."""

from __future__ import annotations

import pytest
import torch

from mpc_fl.errors import ModelError
from mpc_fl.learning.models.scattering import Scattering, scattering
from mpc_fl.learning.models.scattering_in_reals import ScatteringInReals, in_reals
from tests.learning.models.test_scattering import images


@pytest.mark.parametrize("side", [64, 65, 100, 128])
def test_features_are_those_of_scattering(side: int) -> None:
    plain = Scattering()
    given = images(3, side)
    made = ScatteringInReals(plain, side)(given)
    torch.testing.assert_close(made, plain(given), rtol=0, atol=2e-6)


def test_an_image_without_contrast_has_the_features_it_has_there() -> None:
    plain, flat = Scattering(), torch.full((2, 1, 64, 64), 0.5)
    made = ScatteringInReals(plain, 64)(flat)
    assert bool(torch.isfinite(made).all())
    assert made.norm(dim=1).tolist() == pytest.approx(plain(flat).norm(dim=1).tolist(), abs=1e-3)


def test_it_takes_the_place_of_scattering_in_a_copy_of_a_network() -> None:
    network = scattering(3).eval()
    copied = in_reals(network, 64)
    assert not any(isinstance(layer, Scattering) for layer in copied.modules())
    assert any(isinstance(layer, Scattering) for layer in network.modules())
    torch.testing.assert_close(copied(images(2)), network(images(2)), rtol=0, atol=1e-5)
    with pytest.raises(ModelError, match="at least 64 x 64"):
        in_reals(network, 32)
