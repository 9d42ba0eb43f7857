"""The linear check: a linear map, the bound on what escapes it, the coin, and who is named.

Frequencies are over numbered coins, so that they are the same every time; fresh ones would fail with less than 10^-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.aggregation.linear_check import (
    COIN_BYTES,
    MAP_SIZE,
    Evidence,
    Fold,
    LinearMap,
    MapSize,
    as_numbers,
    commitment,
    fits,
    from_numbers,
    joint_coin,
    require_number,
    who_deviates,
)
from mpc_fl.audit.ledger_file import tensor_digest
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ProtocolError

FOLD = Fold(row=128, shifts=128, copies=1)
SMALL = MapSize(Fold(row=64, shifts=32, copies=2), Fold(row=16, shifts=8, copies=2), combinations=5)
T = "a" * 64
dtypes = st.sampled_from([torch.int32, torch.int64])


def coin(number: int) -> bytes:
    return number.to_bytes(COIN_BYTES, "little")


def words(number: int, count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return Seed(coin(number)).stream("words").ring_elements((count,)).to(dtype)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 700), dtypes, st.integers(0, 2**32), st.integers(-(2**31), 2**31 - 1))
def test_the_map_is_linear_in_the_ring_and_wraps(count: int, dtype: torch.dtype, number: int, factor: int) -> None:
    linear = LinearMap(coin(number), SMALL)
    x, y = words(number + 1, count, dtype), words(number + 2, count, dtype)
    told = linear.of(x * factor + y)
    assert told.dtype == dtype and told.shape == (SMALL.combinations,)
    assert torch.equal(told, linear.of(x) * factor + linear.of(y))
    assert fits(linear, x + y, [linear.of(x), linear.of(y)])


def one_word(dtype: torch.dtype) -> torch.Tensor:
    error = torch.zeros(256, dtype=dtype)
    error[255] = torch.iinfo(dtype).min
    return error


def two_words(dtype: torch.dtype) -> torch.Tensor:
    """One half of the ring at the same place of two rows: what one copy misses as often as it may."""
    error = torch.zeros(256, dtype=dtype)
    error[3] = error[131] = torch.iinfo(dtype).min
    return error


def two_places(dtype: torch.dtype) -> torch.Tensor:
    """Opposite words half a row apart: half of all shifts of one row bring the other one there."""
    error = torch.zeros(256, dtype=dtype)
    error[3], error[195] = 5, -5
    return error


def constant_rows(dtype: torch.dtype) -> torch.Tensor:
    """The same in all words: shifted in a circle, it would change nothing."""
    return torch.full((256,), torch.iinfo(dtype).min, dtype=dtype)


def one_constant_row(dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([torch.zeros(128, dtype=dtype), torch.full((128,), 1 << 20, dtype=dtype)])


def folded(number: int, error: torch.Tensor, fold: Fold) -> np.ndarray:
    """`error`, folded with shifts of its own for each number."""
    rows = fold.rows(len(error))
    shifts = Seed(coin(number)).stream("test").words(fold.copies * rows, np.uint32) % np.uint32(fold.shifts)
    return fold.of(error.numpy(), shifts.reshape(fold.copies, rows))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("error", "reached"),
    [(one_word, 0.0), (one_constant_row, 0.0), (two_words, 1.0), (two_places, 0.5), (constant_rows, 1.0)],
)
def test_one_copy_misses_an_error_as_often_as_stated(
    error: Callable[[torch.dtype], torch.Tensor], reached: float, dtype: torch.dtype
) -> None:
    seeds, vector = 6000, error(dtype)
    missed = sum(not folded(seed, vector, FOLD).any() for seed in range(seeds))
    assert abs(missed - seeds * reached * FOLD.escapes) <= 5 * math.sqrt(seeds * FOLD.escapes)
    assert (missed > 0) == (reached > 0)


def test_a_fold_is_the_sum_of_rows_shifted_and_its_copies_have_shifts_of_their_own() -> None:
    fold, vector = Fold(row=4, shifts=8, copies=2), np.arange(1, 11, dtype=np.int32)
    first = np.zeros(11, np.int32)
    first[7:11] += vector[:4]
    first[0:4] += vector[4:8]
    first[2:4] += vector[8:]
    second = np.zeros(11, np.int32)
    second[0:4] += vector[:4]
    second[0:4] += vector[4:8]
    second[7:9] += vector[8:]
    assert fold.of(vector, np.array([[7, 0, 2], [0, 0, 7]])).tolist() == [*first, *second]
    assert fold.length == 22 and fold.rows(10) == 3 and fold.rows(8) == 2


def test_copies_are_independent() -> None:
    fold, seeds = Fold(row=128, shifts=16, copies=2), 12_000
    missed = sum(not folded(seed, two_words(torch.int32), fold).any() for seed in range(seeds))
    assert abs(missed - seeds * fold.escapes) <= 5 * math.sqrt(seeds * fold.escapes) and missed


def test_the_map_draws_shifts_of_all_values_anew_for_each_coin_copy_and_fold() -> None:
    shifts = [LinearMap(coin(number))._places("first", MAP_SIZE.first, 40_000_000) for number in range(2)]
    for drawn in shifts:
        assert drawn.shape == (3, MAP_SIZE.first.rows(40_000_000)) and drawn.min() >= 0
        assert drawn.max() < MAP_SIZE.first.shifts and len({tuple(copy) for copy in drawn}) == 3
        counts = np.bincount(drawn.reshape(-1) >> 10, minlength=16)
        assert len(counts) == 16 and abs(counts - drawn.size / 16).max() <= 5 * math.sqrt(drawn.size / 16)
    assert not np.array_equal(*shifts)


@pytest.mark.parametrize("lowest_bit", [0, 1, 30, 31])
def test_what_escapes_the_combinations_is_a_half_each_whatever_the_lowest_bit(lowest_bit: int) -> None:
    """Of an error of one word, which no fold misses, a combination sees its coefficient."""
    coins, size = 2000, MapSize(Fold(16, 2, 1), Fold(16, 2, 1), combinations=3)
    error = torch.zeros(16, dtype=torch.int32)
    error[11] = -(2**31) if lowest_bit == 31 else 1 << lowest_bit
    escaped = sum(not LinearMap(coin(number), size).of(error).any() for number in range(coins))
    exact = 2.0 ** -(size.combinations * (32 - lowest_bit))
    assert exact <= size.escapes
    assert abs(escaped - coins * exact) <= 5 * math.sqrt(coins * exact * (1 - exact)) + 1e-9 + (exact < 1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.integers(0, 299), st.integers(-(2**31), 2**31 - 1).filter(bool), min_size=1, max_size=6),
    st.integers(0, 31),
    st.integers(0, 2**32),
)
def test_no_error_escapes_more_often_than_stated(errors: dict[int, int], shift: int, first: int) -> None:
    """Small parameters: a few shifts, two combinations. Errors with few words, and of high bits, are the worst."""
    size, coins = MapSize(Fold(row=64, shifts=32, copies=1), Fold(row=32, shifts=32, copies=1), combinations=2), 300
    error = torch.zeros(300, dtype=torch.int64)
    for place, value in errors.items():
        error[place] = value << shift
    error = error.to(torch.int32)
    if not error.any():
        error[0] = -(2**31)
    escaped = sum(not LinearMap(coin(first + number), size).of(error).any() for number in range(coins))
    assert escaped <= coins * size.escapes + 6 * math.sqrt(coins * size.escapes)


def test_the_size_that_is_used_leaves_less_than_two_to_the_minus_forty() -> None:
    assert MAP_SIZE.escapes < 2.0**-41
    linear = LinearMap(coin(1))
    for error in (one_word, two_words, two_places, constant_rows):
        assert linear.of(error(torch.int32)).any()


# ---- the coin ----------------------------------------------------------------------------------------------------------


def test_a_part_of_the_coin_fits_its_commitment_its_hospital_and_its_sum_alone() -> None:
    number = coin(7)
    committed = commitment(T, "hospital-1", number)
    assert require_number(T, "hospital-1", committed, number.hex()) == number
    wrong = [
        (T, "hospital-1", coin(8).hex()),
        (T, "hospital-2", number.hex()),
        ("b" * 64, "hospital-1", number.hex()),
        (T, "hospital-1", number.hex()[:-2]),
        (T, "hospital-1", "zz" * COIN_BYTES),
        (T, "hospital-1", None),
    ]
    for transcript, hospital, shown in wrong:
        with pytest.raises(ProtocolError, match=f"{hospital} showed another part of the coin"):
            require_number(transcript, hospital, committed, shown)


def test_the_coin_is_that_of_all_and_of_this_sum() -> None:
    numbers = {"hospital-0": coin(1), "hospital-1": coin(2)}
    swapped = {"hospital-1": coin(1), "hospital-0": coin(2)}
    coins = [
        joint_coin(T, numbers),
        joint_coin("b" * 64, numbers),
        joint_coin(T, swapped),
        joint_coin(T, {**numbers, "hospital-1": coin(3)}),
        joint_coin(T, {"hospital-0": coin(1)}),
    ]
    assert len(set(coins)) == len(coins) and all(len(each) == COIN_BYTES for each in coins)
    assert joint_coin(T, dict(reversed(numbers.items()))) == coins[0]


# ---- the numbers, and who deviates -------------------------------------------------------------------------------------


def test_numbers_survive_a_message_and_nothing_else_passes() -> None:
    for dtype in (torch.int32, torch.int64):
        told = LinearMap(coin(3), SMALL).of(words(4, 50, dtype))
        assert torch.equal(from_numbers(as_numbers(told), "hospital-0", SMALL, dtype), told)
    good = [1, 2, 3, 4, 5]
    for bad in (None, good[1:], [*good, 6], [True, *good[1:]], [1.0, *good[1:]], [2**31, *good[1:]], ["1", *good[1:]]):
        with pytest.raises(ProtocolError, match="hospital-0 sent something else"):
            from_numbers(bad, "hospital-0", SMALL, torch.int32)


def _evidence(linear: LinearMap) -> Evidence:
    shown = {f"hospital-{rank}": words(rank, 40) for rank in range(3)}
    total = torch.stack(list(shown.values())).sum(0, dtype=torch.int32)
    signed = {name: tensor_digest(each) for name, each in shown.items()}
    return Evidence("hospital-1", total, signed, shown, {name: linear.of(each) for name, each in shown.items()})


def test_the_opener_is_named_for_its_total_and_for_what_it_shows_others_for_their_numbers() -> None:
    linear = LinearMap(coin(5), SMALL)
    fair = _evidence(linear)
    assert who_deviates(linear, fair) == ()
    changed = {**vars(fair), "total": fair.total + 1}
    assert who_deviates(linear, Evidence(**changed)) == ("hospital-1",)
    for name in fair.shown:
        told = {**fair.told, name: fair.told[name] + 1}
        assert who_deviates(linear, Evidence(**{**vars(fair), "told": told})) == (name,)
        for shown in (fair.shown[name] + 1, fair.shown[name][1:], fair.shown[name].long()):
            evidence = Evidence(**{**vars(fair), "shown": {**fair.shown, name: shown}, "told": told})
            assert who_deviates(linear, evidence) == ("hospital-1",)
        missing = {other: each for other, each in fair.shown.items() if other != name}
        assert who_deviates(linear, Evidence(**{**vars(fair), "shown": missing})) == ("hospital-1",)
