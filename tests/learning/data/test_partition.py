"""Partition: disjoint, complete, stratified, fixed by the seed; which patient a file belongs to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.learning.data.partition import generator, partition_dirichlet, partition_equal, patient_of

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=60).map(lambda values: np.array(values, dtype=np.int64))
HOSPITALS = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 1)


def _check_disjoint_and_complete(parts: list[np.ndarray], count: int, hospitals: int) -> None:
    assert len(parts) == hospitals
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))


@given(LABELS, HOSPITALS, SEEDS)
def test_equal_is_disjoint_complete_and_even(labels: np.ndarray, hospitals: int, seed: int) -> None:
    parts = partition_equal(labels, hospitals, seed)
    _check_disjoint_and_complete(parts, len(labels), hospitals)
    assert np.ptp([len(part) for part in parts]) <= 1
    for label in range(4):
        assert np.ptp([int((labels[part] == label).sum()) for part in parts]) <= 1


@given(LABELS, HOSPITALS, SEEDS, st.floats(min_value=5e-324, max_value=1.7e308))
def test_dirichlet_is_disjoint_and_complete(labels: np.ndarray, hospitals: int, seed: int, alpha: float) -> None:
    _check_disjoint_and_complete(partition_dirichlet(labels, hospitals, alpha, seed), len(labels), hospitals)


@given(LABELS, HOSPITALS, SEEDS)
def test_the_seed_fixes_the_outcome(labels: np.ndarray, hospitals: int, seed: int) -> None:
    for first, second in (
        (partition_equal(labels, hospitals, seed), partition_equal(labels, hospitals, seed)),
        (partition_dirichlet(labels, hospitals, 0.5, seed), partition_dirichlet(labels, hospitals, 0.5, seed)),
    ):
        assert [part.tolist() for part in first] == [part.tolist() for part in second]


def test_another_seed_gives_another_partition() -> None:
    labels = np.arange(60) % 3
    assert partition_equal(labels, 3, 0)[0].tolist() != partition_equal(labels, 3, 1)[0].tolist()
    assert partition_dirichlet(labels, 3, 0.5, 0)[0].tolist() != partition_dirichlet(labels, 3, 0.5, 1)[0].tolist()


@given(SEEDS, st.integers(1, 90))
def test_every_prefix_is_a_fair_sample(seed: int, length: int) -> None:
    labels = np.repeat([0, 1, 2], [30, 60, 90])
    (part,) = partition_equal(labels, 1, seed)
    counts = np.bincount(labels[part[:length]], minlength=3)
    # each class is within one patient of its share, plus one for the order of ties
    assert np.all(np.abs(counts - length * np.array([1, 2, 3]) / 6) <= 2)


def _shares(parts: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    counts = np.array([np.bincount(labels[part], minlength=3) for part in parts])
    return counts / counts.sum(0)


@pytest.mark.parametrize("alpha", [1e4, 1e18, 1.7e308])
def test_great_alpha_gives_equal_hospitals(alpha: float) -> None:
    labels = np.arange(3000) % 3
    for seed in range(5):
        np.testing.assert_allclose(_shares(partition_dirichlet(labels, 4, alpha, seed), labels), 0.25, atol=0.03)


@pytest.mark.parametrize("alpha", [1e-300, 1e-6])
def test_tiny_alpha_gives_each_class_to_one_hospital(alpha: float) -> None:
    labels = np.arange(300) % 3
    for seed in range(5):
        shares = _shares(partition_dirichlet(labels, 4, alpha, seed), labels)
        assert np.all((shares == 0) | (shares == 1))


def test_test_patients_of_a_hospital_are_like_its_training_patients() -> None:
    train, test = np.arange(3000) % 3, np.arange(900) % 3
    for seed in range(5):
        shares = [_shares(partition_dirichlet(labels, 3, 0.5, seed), labels) for labels in (train, test)]
        np.testing.assert_allclose(shares[0], shares[1], atol=0.01)
    assert np.abs(shares[0] - 1 / 3).max() > 0.1


def test_generators_of_different_purpose_differ() -> None:
    assert generator(5, 1).random() == generator(5, 1).random()
    assert (
        len({generator(5).random(), generator(5, 1).random(), generator(5, 2).random(), generator(6, 1).random()}) == 4
    )


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("person1_virus_12.jpeg", "person1"),
        ("person12_bacteria_3.jpeg", "person12"),
        ("person1372_virus_2362_1.jpeg", "person1372"),
        ("IM-0429-0001-0002.jpeg", "IM-0429"),
        ("IM-0115-0001.jpeg", "IM-0115"),
        ("NORMAL2-IM-1427-0001.jpeg", "NORMAL2-IM-1427"),
        ("NORMAL2-IM-1396-0001-0002.jpeg", "NORMAL2-IM-1396"),
        ("p17_left.png", "p17"),
        ("p17.png", "p17"),
        ("personal_3.png", "personal"),
        ("synthetic-phantom-3.png", "synthetic-phantom-3"),
        ("_hidden_3.png", "_hidden_3"),
        (".png", ".png"),
        ("IM0001", "IM0001"),
        ("1.2.840.10008.17", "1.2.840.10008.17"),
        ("1.2.840.10008.17.dcm", "1.2.840.10008.17"),
        ("scan.v2.png", "scan.v2"),
    ],
)
def test_patient_of(name: str, patient: str) -> None:
    assert patient_of(name) == patient
