"""Scattering: the transform of its sources, the same bits whoever else is in a batch, and nothing to train or to send."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional

from mpc_fl.config.config import Config
from mpc_fl.errors import ModelError, UnsupportedLayerError
from mpc_fl.inference.graph.tracing import trace
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.parameters import flatten_buffers, trainable_parameters
from mpc_fl.learning.models.rewriting import without_in_place
from mpc_fl.learning.models.scattering import Scattering, scattering

CONFIG = Config().with_values(model={"architecture": "scattering"}, data={"channels": 1, "image_size": 64})
SCALE_PAIRS = ((0, 1), (0, 2), (1, 2))
EIGHT_TIMES = [angle for angle in range(8) for _ in range(8)]


def images(count: int, side: int = 64) -> torch.Tensor:
    """Smooth shapes with some noise, in [0, 1]."""
    draw = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, 1, 6, 6, generator=draw)
    fine = torch.rand(count, 1, side, side, generator=draw)
    return 0.8 * functional.interpolate(coarse, size=(side, side), mode="bilinear") + 0.2 * fine


def averaged_over_fields(order: torch.Tensor) -> torch.Tensor:
    """(channels, 8, 8) to (channels, 4, 4)."""
    return order.reshape(-1, 4, 2, 4, 2).mean(dim=(2, 4))


def features_of(orders: list[torch.Tensor]) -> torch.Tensor:
    """What becomes of S0, S1, S2, each (channels, 8, 8), written out."""
    pooled = [averaged_over_fields(order) for order in orders]
    first, second = torch.log(pooled[1] + 0.01), torch.log(pooled[2] + 0.01)
    values = [
        pooled[0],
        first,
        second - first[[8 * scale + angle for scale, _ in SCALE_PAIRS for angle in EIGHT_TIMES]],
    ]
    centred = [value - value.mean() for value in values]
    return torch.cat([(value / value.norm()).flatten() / math.sqrt(3) for value in centred])


def standardised(image: torch.Tensor) -> torch.Tensor:
    return (image - image.mean()) / image.std(correction=0)


def spatial_wave(frequency: float, width: float, angle: float, slant: float, side: int) -> torch.Tensor:
    """A Gabor function around the middle of a plane of `side` pixels, by its formula."""
    u = torch.arange(side, dtype=torch.float64) - side // 2
    rows, columns = u[:, None], u[None, :]
    along = rows * math.cos(angle) + columns * math.sin(angle)
    across = -rows * math.sin(angle) + columns * math.cos(angle)
    envelope = torch.exp(-(along**2 + slant**2 * across**2) / (2 * width**2)) * slant / (2 * math.pi * width**2)
    return envelope * torch.exp(1j * frequency * along)


def convolved(plane: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """By sums over pixels, not by Fourier transforms; the plane goes on by itself on all sides."""
    reach = kernel.shape[0] // 2
    around = functional.pad(plane[None, None].float(), [reach] * 4, mode="circular")
    flipped = torch.view_as_real(kernel.flip(0, 1)).permute(2, 0, 1)[:, None].float()
    return torch.complex(*functional.conv2d(around, flipped)[0].double())


def test_it_is_the_transform_of_its_definition() -> None:
    """|x * psi| * phi and ||x * psi| * psi| * phi at full resolution. What is sampled on the way differs by its aliases."""
    image = images(1)[0, 0].double()
    plane = functional.pad(standardised(image)[None, None], [8] * 4, mode="reflect")[0, 0]
    phi = spatial_wave(0.0, 3.2, 0.0, 1.0, 33)
    psi = []
    for scale in range(3):
        width, side = 0.8 * 2**scale, 2 ** (scale + 4) + 1
        for place in range(8):
            angle = (3 - place) * math.pi / 8
            wave = spatial_wave(0.75 * math.pi / 2**scale, width, angle, 0.5, side)
            envelope = spatial_wave(0.0, width, angle, 0.5, side)
            psi.append(wave - wave.sum() / envelope.sum() * envelope)

    def averages(values: torch.Tensor) -> torch.Tensor:
        return convolved(values, phi).real[::8, ::8][1:-1, 1:-1]

    once = [convolved(plane, wavelet).abs() for wavelet in psi]
    orders = [averages(plane)[None], torch.stack([averages(values) for values in once])]
    some = {}  # of 192: three angles of each pair of scales
    for pair, (first, second) in enumerate(SCALE_PAIRS):
        for angle in (0, 3, 5):
            values = convolved(once[8 * first + angle], psi[8 * second + 2]).abs()
            some[64 * pair + 8 * angle + 2] = averages(values)
    found = Scattering()(image.float()[None, None])[0].double()
    wanted = features_of([*orders, torch.ones(192, 8, 8).double()])
    assert torch.allclose(found[:16], wanted[:16], atol=1e-5)  # nothing is sampled before the last step
    assert torch.allclose(found[16:400], wanted[16:400], atol=3e-3)
    second_order = found[400:].reshape(192, 16)[list(some)].flatten()  # up to what centred it and its length
    fields = averaged_over_fields(orders[1])
    parents = torch.stack([fields[8 * SCALE_PAIRS[place // 64][0] + place % 64 // 8] for place in some])
    ratios = torch.log(averaged_over_fields(torch.stack(list(some.values()))) + 0.01) - torch.log(parents + 0.01)
    for part, whole in ((found[16:400], wanted[16:400]), (second_order, ratios.flatten())):
        assert torch.corrcoef(torch.stack([part, whole]))[0, 1] > 0.997


def kymatio_in_two_dimensions() -> tuple[ModuleType, ...]:
    """Its filters, transform and operations. The package as a whole cannot be imported where SciPy has no `sph_harm`."""
    place = os.environ.get("MPC_FL_KYMATIO", "")
    if place and place not in sys.path:
        sys.path.insert(0, place)
    found = importlib.util.find_spec("kymatio")
    if found is None or found.origin is None:
        pytest.skip("kymatio is not installed, nor at MPC_FL_KYMATIO")
    for name in ("kymatio", "kymatio.scattering2d"):
        package = ModuleType(name)
        package.__path__ = [str(Path(found.origin).parent.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    names = ("filter_bank", "core.scattering2d", "backend.numpy_backend")
    return tuple(importlib.import_module(f"kymatio.scattering2d.{name}") for name in names)


def test_kymatio_gives_the_same() -> None:
    filters, transform, operations = kymatio_in_two_dimensions()
    bank, backend = filters.filter_bank(80, 80, 3, 8), operations.NumpyBackend2D
    image = images(1)[0, 0].double()
    padding = backend.Pad([8, 8, 8, 8], [64, 64])
    listed = transform.scattering2d(
        standardised(image)[None].numpy(), padding, backend.unpad, backend, 3, 8, bank["phi"], bank["psi"], 2, "list"
    )
    coefficients = {each["n"]: torch.from_numpy(each["coef"][0]) for each in listed}
    pairs = [(8 * a + m, 8 * b + n) for a, b in SCALE_PAIRS for m in range(8) for n in range(8)]
    orders = [[()], [(place,) for place in range(24)], pairs]
    wanted = features_of([torch.stack([coefficients[place] for place in order]) for order in orders])
    found = Scattering()(image.float()[None, None])[0].double()
    assert float((found - wanted).abs().max()) < 2e-6


def test_one_image_gives_the_same_bits_whoever_else_is_in_the_batch() -> None:
    transform, batch = Scattering(), images(5)
    together = transform(batch)
    assert together.dtype == torch.float32 and together.shape == (5, transform.output_features) == (5, 3472)
    for place in range(5):
        assert torch.equal(transform(batch[place : place + 1])[0], together[place])
    assert torch.equal(transform(batch[[3, 1]]), together[[3, 1]])
    assert torch.equal(Scattering()(batch), together)
    assert torch.allclose(together.norm(dim=1), torch.ones(5))
    assert transform(batch[:0]).shape == (0, 3472)


def test_larger_images_are_averaged_and_brightness_does_not_count() -> None:
    transform, small = Scattering(), images(2)
    large = small.repeat_interleave(3, dim=2).repeat_interleave(2, dim=3)
    assert torch.allclose(transform(large), transform(small), atol=1e-5)
    assert torch.allclose(transform(0.25 + small / 2), transform(small), atol=1e-4)


def test_an_image_without_contrast_has_finite_features() -> None:
    features = Scattering()(torch.stack([torch.zeros(1, 64, 64), torch.ones(1, 64, 64)]))
    assert bool(torch.isfinite(features).all()) and float(features.norm(dim=1).max()) <= 1.0001


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (1, 1, 63, 64), (1, 64, 64)])
def test_other_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=r"takes grey images of at least 64 x 64 pixels.*set data\.channels=1"):
        Scattering()(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 32, 64), (1, 64, 32)])
def test_the_architecture_refuses_such_data_before_a_run(shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="takes grey images of at least 64 x 64"):
        build_model(CONFIG, input_shape=shape)


def test_nothing_of_it_is_trained_sent_or_in_a_file() -> None:
    model = build_model(CONFIG)
    assert [name for name, _ in trainable_parameters(model)] == ["classifier.weight", "classifier.bias"]
    assert list(model.state_dict()) == ["classifier.weight", "classifier.bias"]
    assert flatten_buffers(model).numel() == 0


def test_it_can_be_recorded_and_copied_for_training() -> None:
    model = scattering(3).eval()
    recorded = without_in_place(copy.deepcopy(model))
    assert torch.equal(recorded(images(3)), model(images(3)))


def test_encryption_refuses_it_by_name() -> None:
    with pytest.raises(
        UnsupportedLayerError, match=r"layer 'features.*' of type scattering_features has no .*efficientnet_lite0"
    ):
        trace(build_model(CONFIG))
