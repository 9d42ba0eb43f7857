"""Phantoms: deterministic, balanced, in range, and not to be told apart by brightness alone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from mpc_fl.config.config import Config
from mpc_fl.errors import DataError
from mpc_fl.learning.data.loading import load_hospital
from mpc_fl.learning.data.phantoms import Split, make_phantoms, public_phantoms

SPLITS: tuple[Split, ...] = ("train", "test", "public")


@pytest.mark.parametrize("split", SPLITS)
def test_same_seed_and_split_give_the_same_phantoms(split: Split) -> None:
    first, second = make_phantoms(30, 3, 16, 7, split), make_phantoms(30, 3, 16, 7, split)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.patients, second.patients)


def test_splits_and_seeds_share_no_image() -> None:
    made = [make_phantoms(30, 3, 16, seed, split).images for seed in (7, 8) for split in SPLITS]
    images = np.concatenate(made)
    assert len({image.tobytes() for image in images}) == len(images) > 180
    # nor nearly the same: noise alone makes pixels differ by about 0.05
    for one, other in combinations(made, 2):
        distance = np.abs(one[:, None] - other[None]).mean((2, 3))
        assert distance.min() > 0.02


@pytest.mark.parametrize(("patients", "classes"), [(300, 3), (301, 3), (300, 2)])
def test_classes_are_balanced_over_patients(patients: int, classes: int) -> None:
    made = make_phantoms(patients, classes, 8, 0, "train")
    images_of = np.bincount(made.patients)
    assert len(images_of) == patients and set(images_of) == {1, 2}
    assert 0.1 < (images_of == 2).mean() < 0.3
    label_of = np.array([made.labels[made.patients == patient][0] for patient in range(patients)])
    assert np.ptp(np.bincount(label_of, minlength=classes)) <= 1
    assert np.array_equal(label_of[made.patients], made.labels)  # one class per patient


@pytest.mark.parametrize("size", [8, 32, 50])
def test_form_and_range(size: int) -> None:
    made = make_phantoms(40, 3, size, 1, "train")
    assert made.images.dtype == np.float32 and made.labels.dtype == made.patients.dtype == np.int64
    assert made.images.shape == (len(made.labels), size, size)
    assert made.images.min() >= 0 and made.images.max() <= 1
    assert made.images.std((1, 2)).min() > 0.1  # not empty, not saturated


@pytest.mark.parametrize("seed", [0, 1])
def test_mean_brightness_does_not_separate_the_classes(seed: int) -> None:
    made = make_phantoms(900, 3, 32, seed, "train")
    mean = made.images.mean((1, 2))
    truth = np.eye(3, dtype=int)[made.labels]
    best = 0.0
    for low, high in combinations(np.quantile(mean, np.linspace(0, 1, 31)), 2):
        region = (mean >= low).astype(int) + (mean >= high)
        best = max(best, sum(truth[region == part].sum(0).max() for part in range(3)) / len(mean))
    assert 1 / 3 < best < 0.45


def test_the_classes_differ_in_texture_and_symmetry() -> None:
    made = make_phantoms(300, 3, 32, 0, "train")
    roughness = np.abs(np.diff(made.images, axis=2)).mean((1, 2))
    normal, bacterial, viral = (roughness[made.labels == label].mean() for label in range(3))
    assert viral > 1.1 * normal and viral > 1.1 * bacterial
    smooth = torch.nn.functional.avg_pool2d(torch.from_numpy(made.images)[:, None], 7, 1)[:, 0]
    one_sided = (smooth - smooth.flip(-1)).abs().amax((1, 2)).numpy()  # a focal opacity lies in one lung
    normal, bacterial, viral = (one_sided[made.labels == label].mean() for label in range(3))
    assert bacterial > 1.2 * normal and bacterial > 1.2 * viral


@pytest.mark.parametrize("classes", [0, 1, 4])
def test_other_numbers_of_classes_are_refused(classes: int) -> None:
    with pytest.raises(DataError, match=f"phantoms have 2 or 3 classes, not {classes}: set data.classes"):
        make_phantoms(10, classes, 16, 0, "train")


def test_public_phantoms_belong_to_no_split() -> None:
    config = Config().with_values(
        data={"channels": 3, "image_size": 16, "phantoms": {"train_patients": 40, "test_patients": 40}}
    )
    public = public_phantoms(10, config)
    assert public.shape == (10, 3, 16, 16) and public.dtype == torch.float32 and public.is_contiguous()
    assert torch.equal(public[:, 0], public[:, 2])
    own = [load_hospital(config, rank, split).inputs for rank in range(3) for split in ("train", "test")]
    assert not any((image == public).flatten(1).all(1).any() for image in torch.cat(own))


def test_names_say_that_they_are_synthetic() -> None:
    config = Config().with_values(data={"phantoms": {"train_patients": 30, "test_patients": 30}})
    names = [
        name for rank in range(3) for split in ("train", "test") for name in load_hospital(config, rank, split).names
    ]
    assert len(set(names)) == len(names) >= 60
    assert all(name.startswith("synthetic-phantom-") for name in names)
