"""Tests of words: they pass what is uniform as often as they say, and find masks that were left out, used twice, or short."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.evidence import uniformity

WORDS = 4000


def drawn(label: int, count: int = WORDS) -> np.ndarray:
    """Key stream, the same in each run of the tests."""
    return Seed(hashlib.sha256(b"words %d" % label).digest()).stream("words").words(count, np.uint32)


def update(label: int, count: int = WORDS) -> np.ndarray:
    """An encoded update: 24 binary places of numbers about 0.01."""
    numbers = np.random.Generator(np.random.Philox(label)).normal(0, 0.01, count)
    return np.round(numbers * 2**24).astype(np.int64).astype(np.uint32)


def least(p_values: dict[str, float]) -> float:
    return min(p_values.values())


def test_tails_are_those_of_a_library() -> None:
    for freedom in (1, 32, 255):
        for statistic in (0.5, 40.0, 300.0, 900.0):
            found = uniformity._chi_square_tail(statistic, freedom)
            assert found == pytest.approx(float(stats.chi2.sf(statistic, freedom)), rel=1e-9, abs=1e-300)
    assert uniformity._normal_tail(-1.96) == pytest.approx(2 * float(stats.norm.sf(1.96)))


def test_frequencies_are_the_chi_square_test_of_a_library() -> None:
    words = drawn(1)
    counts = np.bincount(words.view(np.uint8), minlength=256)
    assert uniformity.byte_frequencies(words) == pytest.approx(float(stats.chisquare(counts).pvalue))
    ones = np.array([int(((words >> np.uint32(place)) & 1).sum()) for place in range(32)])
    of_each = [float(stats.chisquare([count, WORDS - count]).statistic) for count in ones]
    assert uniformity.bit_frequencies(words) == pytest.approx(float(stats.chi2.sf(sum(of_each), 32)))


def test_uniform_words_are_rejected_as_often_as_the_level_says() -> None:
    """200 pairs: of each test between 2 and 22 p-values are below 0.05, which chance leaves once in 10^4 times."""
    found: dict[str, list[float]] = {}
    for label in range(200):
        words, others = drawn(2 * label, 1000), drawn(2 * label + 1, 1000)
        plain = update(label, 1000)
        p_values = uniformity.p_values_of_one(words) | uniformity.p_values_of_two(words, others)
        p_values["with numbers"] = uniformity.correlation(words, plain.astype(np.int32).astype(float))
        p_values["bits of numbers"] = uniformity.equal_bits(words, plain)
        for name, value in p_values.items():
            found.setdefault(name, []).append(value)
    assert len(found) == 11
    for name, values in found.items():
        assert 2 <= sum(value < 0.05 for value in values) <= 22, name
        assert 70 <= sum(value < 0.5 for value in values) <= 130, name


def test_what_is_not_masked_is_found_by_each_test_of_its_kind() -> None:
    found = uniformity.p_values_of_one(update(1))
    assert max(found["bytes"], found["runs"]) < 1e-100  # as many bits are one as zero, where signs are balanced
    assert uniformity.bit_frequencies(update(1) & np.uint32(0x7FFFFFFF)) < 1e-100
    assert uniformity.serial_correlation(np.arange(WORDS, dtype=np.uint32) << np.uint32(20)) < 1e-100
    assert uniformity.correlation(update(1), update(1).astype(np.int32).astype(float)) < 1e-100


def test_one_mask_for_two_updates_is_found_though_each_looks_uniform() -> None:
    mask = drawn(3)
    first, second = mask + update(1), mask + update(2)
    assert least(uniformity.p_values_of_one(first)) > 1e-3 and least(uniformity.p_values_of_one(second)) > 1e-3
    assert least(uniformity.p_values_of_two(first, second)) < 1e-100
    assert least(uniformity.p_values_of_two(mask + update(1), drawn(4) + update(1))) > 1e-3


def test_a_mask_of_16_bits_leaves_the_update_in_the_words_above() -> None:
    words = (drawn(5) & np.uint32(0xFFFF)) + update(3)
    assert uniformity.bit_frequencies(words) < 1e-100
    assert uniformity.equal_bits(words, update(3)) < 1e-100


def test_numbers_that_are_all_equal_correlate_with_nothing() -> None:
    assert uniformity.correlation(drawn(6), np.zeros(WORDS)) == 1.0


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        uniformity.p_values_of_one(drawn(1, 300))
    with pytest.raises(ValueError, match="same length"):
        uniformity.p_values_of_two(drawn(1), drawn(1, 2000))
    with pytest.raises(ValueError, match="no words"):
        uniformity.words_of(torch.zeros(3))


def test_words_of_a_tensor_are_its_elements_in_row_order() -> None:
    tensor = torch.tensor([[-1, 2], [3, -4]], dtype=torch.int32).t()
    assert uniformity.words_of(tensor).tolist() == [2**32 - 1, 3, 2, 2**32 - 4]
    assert uniformity.words_of(torch.tensor([-1])).tolist() == [2**64 - 1]


def test_holm_rejects_what_the_shared_out_level_leaves() -> None:
    assert uniformity.rejected([0.04, 0.01, 0.012, 0.9], 0.05) == [False, True, True, False]
    assert uniformity.rejected([0.02, 0.02], 0.05) == [True, True]
    assert uniformity.rejected([0.03, 0.04], 0.05) == [False, False]
    assert uniformity.rejected([], 0.05) == []
