"""Partition: disjoint, complete, stratified, fixed by the seed; which patient a file belongs to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpc_fl.learning.data import partition
from mpc_fl.learning.data.partition import generator, patient_of, place_of, places_of

LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=60).map(lambda values: np.array(values, dtype=np.int64))
HOSPITALS = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 1)


def _names(count: int) -> list[str]:
    return [f"patient {number}" for number in range(count)]


def partition_equal(labels: np.ndarray, hospitals: int, seed: int) -> list[np.ndarray]:
    return partition.partition_equal(_names(len(labels)), labels, hospitals, seed)


def partition_dirichlet(labels: np.ndarray, hospitals: int, alpha: float, seed: int) -> list[np.ndarray]:
    return partition.partition_dirichlet(_names(len(labels)), labels, hospitals, alpha, seed)


def _check_disjoint_and_complete(parts: list[np.ndarray], count: int, hospitals: int) -> None:
    assert len(parts) == hospitals
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))


@given(LABELS, HOSPITALS, SEEDS)
def test_equal_is_disjoint_complete_and_even(labels: np.ndarray, hospitals: int, seed: int) -> None:
    parts = partition_equal(labels, hospitals, seed)
    _check_disjoint_and_complete(parts, len(labels), hospitals)
    assert np.ptp([len(part) for part in parts]) <= 4  # classes
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


@given(LABELS, HOSPITALS, SEEDS, st.integers(0, 3), st.booleans())
def test_one_patient_more_moves_a_few_neighbours_at_most(
    labels: np.ndarray, hospitals: int, seed: int, label: int, dirichlet: bool
) -> None:
    # With Dirichlet a class that is new draws for itself, so all classes are there before.
    labels = np.concatenate([np.arange(4), labels])
    more = np.append(labels, label)

    def owners(values: np.ndarray) -> np.ndarray:
        parts = (
            partition_dirichlet(values, hospitals, 0.5, seed) if dirichlet else partition_equal(values, hospitals, seed)
        )
        found = np.empty(len(values), dtype=int)
        for rank, part in enumerate(parts):
            found[part] = rank
        return found

    before, after = owners(labels), owners(more)[:-1]
    moved = np.flatnonzero(before != after)
    assert len(moved) < hospitals
    assert np.all(labels[moved] == label)


def test_the_order_within_a_hospital_is_kept() -> None:
    labels = np.zeros(40, dtype=int)
    (before,), (after,) = partition_equal(labels, 1, 3), partition_equal(np.zeros(41, dtype=int), 1, 3)
    assert [number for number in after.tolist() if number != 40] == before.tolist()


def test_places_are_even_and_differ_by_purpose_and_seed() -> None:
    names = _names(4000)
    places = [places_of(names, *of) for of in (("a",), ("b",), ("a", 1))]
    for found in places:
        assert found.min() >= 0 and found.max() < 1
        np.testing.assert_allclose(np.histogram(found, 10, (0, 1))[0], 400, atol=100)  # 5 standard deviations
    assert np.abs(np.corrcoef(places)[np.triu_indices(3, 1)]).max() < 0.08
    assert place_of("patient 7", "a") == places[0][7] == place_of("patient 7", "a", 0)


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
