"""Comparison gates of the engine `fast`: right on every value, and everything that is opened or sent is uniform.

Seeds are fresh, so the statistical tests fail by chance: each p-value is compared with `FALSE_ALARM` and the test says
how many there are.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import SecrecyError
from mpc_fl.inference.fast.kernels.bit_planes import bits_of, pack, packed_bytes, planes_of, unpack
from mpc_fl.inference.fast.kernels.pooling import max_pool, max_pool_counts, maximum, sum_pool
from mpc_fl.inference.fast.layers import AveragePool, MaxPool
from mpc_fl.inference.fast.online.comparison import Exchange, compare
from mpc_fl.inference.fast.preprocessing import gate_correlation
from mpc_fl.inference.fast.preprocessing.correlations import OneTime
from mpc_fl.inference.fast.preprocessing.gate_correction import correction_of
from mpc_fl.inference.fast.preprocessing.gate_correlation import ComparisonGate, GateMaterial, Result

FALSE_ALARM = 1e-9

Messages = list[np.ndarray]


def run_pair(function: Callable[[bool, Exchange], Any]) -> tuple[tuple[Any, Any], tuple[Messages, Messages]]:
    """Run `function(first, exchange)` as C and as S; their results, and what each of them sent."""
    inboxes: tuple[queue.Queue[np.ndarray], queue.Queue[np.ndarray]] = (queue.Queue(), queue.Queue())
    results: list[Any] = [None, None]
    sent: tuple[Messages, Messages] = ([], [])

    def party(index: int) -> None:
        def exchange(message: np.ndarray, meanwhile: Callable[[], object] | None = None) -> np.ndarray:
            sent[index].append(message.copy())
            inboxes[1 - index].put(message.copy())
            if meanwhile is not None:
                meanwhile()
            return inboxes[index].get(timeout=60)

        results[index] = function(index == 0, exchange)

    threads = [threading.Thread(target=party, args=(index,), daemon=True) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    return (results[0], results[1]), sent


def materials(gate: ComparisonGate) -> tuple[GateMaterial, GateMaterial, np.ndarray]:
    """C's and S's part, and S's correction."""
    keys = Seed.from_system().reveal_for_transport(), Seed.from_system().reveal_for_transport()
    hospital, owner = (Seed(key).stream("gate") for key in keys)
    correction = correction_of(gate, hospital, owner)
    hospital, owner = (Seed(key).stream("gate") for key in keys)
    return (
        GateMaterial(gate, hospital),
        GateMaterial(gate, owner, correction.copy()),
        correction,
    )


def modulo(values: np.ndarray, bits: int) -> np.ndarray:
    return values.astype(np.int64).astype(np.uint32) & np.uint32((1 << bits) - 1)


def split(values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares modulo 2^bits of signed values of any shape."""
    hospital = Seed.from_system().stream("share").words(values.size, np.uint32).reshape(values.shape)
    hospital &= np.uint32((1 << bits) - 1)
    return hospital, modulo(values - hospital.astype(np.int64), bits)


def evaluate(
    values: np.ndarray, bits: int, result: Result, ceiling: int | None = None
) -> tuple[np.ndarray, tuple[Messages, Messages], Any]:
    gate = ComparisonGate(bits, len(values), result, ceiling)
    shares, (hospital, owner, correction) = split(values, bits), materials(gate)
    before = [share.copy() for share in shares]
    outputs, sent = run_pair(
        lambda first, exchange: compare(hospital if first else owner, shares[0 if first else 1], first, exchange)
    )
    assert all(np.array_equal(*pair) for pair in zip(before, shares, strict=True))  # inputs stay as they are
    return outputs[0] + outputs[1], sent, (gate, outputs, correction)


def expected(values: np.ndarray, result: Result, ceiling: int | None = None) -> np.ndarray:
    return values if result is Result.EXTENDED else np.clip(values, 0, ceiling)


def fits(values: np.ndarray, bits: int, result: Result) -> np.ndarray:
    """What a gate is made for: a sign extension has one bit to spare."""
    most = 1 << bits - (2 if result is Result.EXTENDED else 1)
    return (values >= -most) & (values < most)


def check(values: np.ndarray, bits: int, result: Result, ceiling: int | None = None) -> None:
    values = values[fits(values, bits, result)]
    opened, sent, (gate, _, _) = evaluate(values, bits, result, ceiling)
    width = bits if result is Result.NARROW else 32
    assert np.array_equal(modulo(opened.astype(np.int64), width), modulo(expected(values, result, ceiling), width))
    lengths = [packed_bytes(bits, gate.count)]
    if result is not Result.EXTENDED:
        lengths += [8 * gate.masks * gate.words, 8 * gate.words * (1 if ceiling is None else 2)]
    assert len(lengths) == gate.openings
    assert [len(message) for message in sent[0]] == [len(message) for message in sent[1]] == lengths


# --- right on every value -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", Result)
@pytest.mark.parametrize("bits", [8, 9, 10, 11, 12, 13, 16])
def test_every_value_of_a_narrow_width(bits: int, result: Result) -> None:
    check(np.arange(-(1 << bits - 1), 1 << bits - 1), bits, result)


@pytest.mark.parametrize("result", Result)
def test_every_value_of_20_bits(result: Result) -> None:
    check(np.arange(-(1 << 19), 1 << 19), 20, result)


def boundaries(bits: int) -> list[int]:
    largest = (1 << bits - 1) - 1
    powers = [sign * (1 << power) + step for power in range(bits - 1) for sign in (-1, 1) for step in (-1, 0, 1)]
    return sorted({0, 1, -1, largest, -largest - 1, *[value for value in powers if -largest <= value <= largest]})


def around(bits: int, ceiling: int) -> np.ndarray:
    """Boundaries, and numbers next to the ceiling: those of which x - ceiling fits."""
    numbers = {*boundaries(bits), ceiling - 1, ceiling, ceiling + 1, ceiling - (1 << bits - 1)}
    return np.array([each for each in sorted(numbers) if ceiling - (1 << bits - 1) <= each < 1 << bits - 1])


def ceilings(bits: int) -> st.SearchStrategy[int]:
    """As those of ReLU6, with many zeros below, and any."""
    rounded = st.integers(0, bits - 4).flatmap(lambda zeros: st.sampled_from([1, 3, 5]).map(lambda odd: odd << zeros))
    return st.one_of(rounded, st.integers(1, (1 << bits - 1) - 1)).filter(lambda ceiling: ceiling < 1 << bits - 1)


@given(st.data())
def test_any_width_and_number(data: st.DataObject) -> None:
    bits, result = data.draw(st.integers(8, 24)), data.draw(st.sampled_from(list(Result)))
    ceiling = None if result is Result.EXTENDED else data.draw(st.one_of(st.none(), ceilings(bits)))
    least = (ceiling or 0) - (1 << bits - 1)
    some = boundaries(bits) if ceiling is None else around(bits, ceiling).tolist()
    numbers = st.one_of(st.sampled_from(some), st.integers(least, (1 << bits - 1) - 1))
    values = np.array([0, *data.draw(st.lists(numbers, max_size=300))])
    check(values, bits, result, ceiling)


@pytest.mark.parametrize("result", [Result.WIDE, Result.NARROW])
@pytest.mark.parametrize("bits", [8, 10, 13])
def test_every_value_below_and_above_every_kind_of_ceiling(bits: int, result: Result) -> None:
    """One bit, several, none of the lowest, all; and with every number of digits in common."""
    for ceiling in (1, 3, 6 << bits - 5, (1 << bits - 1) - 1, *(1 << place for place in range(1, bits - 1))):
        check(np.arange(ceiling - (1 << bits - 1), 1 << bits - 1), bits, result, ceiling)


@pytest.mark.parametrize("result", [Result.WIDE, Result.NARROW])
@pytest.mark.parametrize("bits", range(8, 25))
def test_boundaries_of_ceilings(bits: int, result: Result) -> None:
    for ceiling in (3 << bits // 2, 1 << bits - 2, 5):
        check(np.tile(around(bits, ceiling), 3), bits, result, ceiling)


@pytest.mark.parametrize("result", Result)
@pytest.mark.parametrize("bits", range(8, 25))
def test_boundaries(bits: int, result: Result) -> None:
    check(np.array(boundaries(bits) * 3), bits, result)


def test_more_gates_than_one_pass() -> None:
    count = gate_correlation.CHUNK + 1001
    values = np.resize(np.array(boundaries(20)), count)
    for result in Result:
        check(values, 20, result)
    check(np.resize(around(19, 6 << 12), count), 19, Result.WIDE, 6 << 12)


@given(st.integers(8, 24), st.lists(st.integers(0, (1 << 24) - 1), min_size=1, max_size=200))
def test_packing(bits: int, numbers: list[int]) -> None:
    values = np.array(numbers, dtype=np.uint32) & np.uint32((1 << bits) - 1)
    packed = pack(values, bits)
    assert len(packed) == packed_bytes(bits, len(values))
    assert np.array_equal(unpack(packed, bits, len(values)), values)
    planes = planes_of(values, bits)
    assert np.array_equal(
        sum(bits_of(plane, len(values)).astype(np.uint32) << i for i, plane in enumerate(planes)), values
    )


def test_a_gate_of_another_size_is_refused() -> None:
    hospital, _, correction = materials(ComparisonGate(20, 10, Result.WIDE))
    with pytest.raises(ValueError, match="another size"):
        GateMaterial(ComparisonGate(20, 11, Result.WIDE), Seed.from_system().stream("gate"), correction)
    with pytest.raises(ValueError, match="does not fit"):
        compare(hospital, np.zeros(11, dtype=np.uint32), True, lambda message, meanwhile=None: message)
    for bits, count in ((7, 1), (25, 1), (20, 0)):
        with pytest.raises(ValueError, match="8 to 24 bits"):
            ComparisonGate(bits, count, Result.WIDE)
    for ceiling, result in ((0, Result.WIDE), (-1, Result.WIDE), (1 << 19, Result.NARROW), (1, Result.EXTENDED)):
        with pytest.raises(ValueError, match="a gate's ceiling"):
            ComparisonGate(20, 1, result, ceiling)


def test_bytes_per_gate() -> None:
    """What the docs state, at k = 20: 3.75 or 2.5 bytes per direction online; corrections of 27, 21 and 4 bytes."""
    count = 6400
    for result, correction, online in ((Result.WIDE, 27, 3.75), (Result.NARROW, 21, 3.75), (Result.EXTENDED, 4, 2.5)):
        gate = ComparisonGate(20, count, result)
        assert gate.correction_bytes == correction * count
        masked = gate.masks + len(gate.thresholds)
        assert packed_bytes(20, count) + 8 * masked * gate.words == online * count


def test_bytes_per_gate_with_a_ceiling() -> None:
    """One opening, digits in common, one set of tables: of two gates' bytes half online, two thirds or less of corrections."""
    count = 6400
    for bits, fraction, online, correction in ((20, 12, 3.875, 36.625), (19, 12, 3.75, 32.625), (17, 11, 3.5, 28.625)):
        gate, plain = (ComparisonGate(bits, count, Result.WIDE, ceiling) for ceiling in (6 << fraction, None))
        assert gate.correction_bytes == correction * count <= 0.7 * 2 * plain.correction_bytes
        sent = packed_bytes(bits, count) + 8 * (gate.masks + 2) * gate.words
        assert sent == online * count
        assert sent < 0.57 * 2 * (packed_bytes(bits, count) + 8 * (plain.masks + 1) * plain.words)


@given(st.data())
def test_masks_of_two_thresholds_differ_but_for_common_digits(data: st.DataObject) -> None:
    """Each opened digit bit has a mask of its own, and what is opened once only is the same bit for both thresholds."""
    bits = data.draw(st.integers(8, 24))
    ceiling = data.draw(ceilings(bits))
    gate = ComparisonGate(bits, 1, Result.WIDE, ceiling)
    one, other = gate.mask_rows
    digits, alike = len(gate.digits), sum(gate.digits[: gate.common])
    assert digits >= 2 and sum(gate.digits) == bits - 1 and ceiling % (1 << alike) == 0
    assert len(set(one)) == len(set(other)) == len(one) == len(other) == 2 * digits - 1
    assert set(one) | set(other) == set(range(gate.masks))
    shared = {place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] == pair[1]}
    assert shared == {*range(gate.common), *range(digits, digits + max(gate.common - 1, 0))}
    # A product of masks is corrected once where both thresholds need the same, and never stands for two.
    made = {}
    for masks, products in zip(gate.mask_rows, gate.product_rows, strict=True):
        for (less, subset), row in zip(gate_correlation.monomials(digits), products, strict=True):
            factors = {masks[digits + place] for place in range(digits - 1) if subset >> place & 1}
            factors |= set() if less is None else {masks[less]}
            assert made.setdefault(row, factors) == factors
    assert sorted(made) == list(range(gate.product_planes)) and len(set(map(frozenset, made.values()))) == len(made)


# --- uniform ------------------------------------------------------------------------------------------------------------


def assert_uniform(cells: np.ndarray, count: int, what: str) -> None:
    observed = np.bincount(cells.astype(np.int64), minlength=count)
    assert len(observed) == count
    assert stats.chisquare(observed).pvalue > FALSE_ALARM, what


@pytest.mark.parametrize("result", Result)
@pytest.mark.parametrize("value", [0, 5, -5, (1 << 19) - 1, -(1 << 19)])
def test_everything_opened_sent_and_corrected_is_uniform(value: int, result: Result) -> None:
    """For one fixed secret: 19 p-values a case at most, 15 cases, 10^-9 each: a false alarm once in 3 million runs."""
    bits, count = 20, 64_000
    _, sent, (gate, outputs, correction) = evaluate(np.full(count, value), bits, result)
    for who, messages in zip(("C", "S"), sent, strict=True):
        for step, message in enumerate(messages):
            assert_uniform(message, 256, f"message {step} of {who}")
    assert_uniform(correction, 256, "S's correction")
    for output in outputs:
        assert_uniform(output & np.uint32(0xFF), 256, "a share of the result")
        assert_uniform(output >> np.uint32(12 if result is Result.NARROW else 24), 256, "a share of the result")
    # The opened values, jointly: a digit of c, both masked bits of that digit, and t.
    c = unpack(sent[0][0], bits, count) + unpack(sent[1][0], bits, count)
    top = (c >> np.uint32(bits - 1)) & np.uint32(1)
    if result is Result.EXTENDED:
        assert_uniform(c & np.uint32(0xFF), 256, "the low bits of c")
        for output in outputs:
            assert_uniform(
                2 * ((output >> np.uint32(bits)) & np.uint32(0x7F)) + top, 256, "a share and the highest bit of c"
            )
        return
    masked = (sent[0][1] ^ sent[1][1]).view(np.uint64).reshape(gate.masks, gate.words)
    t = bits_of((sent[0][2] ^ sent[1][2]).view(np.uint64), count)
    digits = len(gate.digits)
    for digit in range(digits):
        cells = (c >> np.uint32(4 * digit)) & np.uint32((1 << gate.digits[digit]) - 1)
        cells = 4 * cells + 2 * bits_of(masked[digit], count) + t
        cell_count = 4 << gate.digits[digit]
        if digit:
            cells = 2 * cells + bits_of(masked[digits + digit - 1], count)
            cell_count *= 2
        assert_uniform(cells, cell_count, f"digit {digit} of what is opened")
    assert_uniform(2 * top + t, 4, "the highest bit of c and t")
    # Shares of the result stay uniform when all that was opened is known.
    for output in outputs:
        assert_uniform(2 * (output & np.uint32(0x7F)) + t, 256, "a share of the result and t")


@pytest.mark.parametrize("result", [Result.WIDE, Result.NARROW])
@pytest.mark.parametrize("value", [0, 5, -5, 24575, 24576, (1 << 19) - 1, 24576 - (1 << 19)])
def test_everything_opened_sent_and_corrected_with_a_ceiling_is_uniform(value: int, result: Result) -> None:
    """For one fixed secret: some 30 p-values a case, 14 cases, 10^-9 each."""
    bits, count, ceiling = 20, 64_000, 6 << 12
    _, sent, (gate, outputs, correction) = evaluate(np.full(count, value), bits, result, ceiling)
    for who, messages in zip(("C", "S"), sent, strict=True):
        for step, message in enumerate(messages):
            assert_uniform(message, 256, f"message {step} of {who}")
    assert_uniform(correction, 256, "S's correction")
    # The opened values, jointly for both thresholds: a digit of c, the masked bits of that digit in both, t and t'.
    c = unpack(sent[0][0], bits, count) + unpack(sent[1][0], bits, count)
    masked = (sent[0][1] ^ sent[1][1]).view(np.uint64).reshape(gate.masks, gate.words)
    t = [bits_of(each, count) for each in (sent[0][2] ^ sent[1][2]).view(np.uint64).reshape(2, -1)]
    both, digits = 2 * t[0] + t[1], len(gate.digits)
    assert_uniform(both, 4, "t and t'")
    for digit in range(digits):
        start = sum(gate.digits[:digit])
        cells = 4 * ((c >> np.uint32(start)) & np.uint32((1 << gate.digits[digit]) - 1)) + both
        places = {rows[place] for rows in gate.mask_rows for place in (digit, *([digits + digit - 1] if digit else []))}
        for place in sorted(places):
            cells = 2 * cells + bits_of(masked[place], count)
        assert_uniform(cells, 4 << gate.digits[digit] + len(places), f"digit {digit} of what is opened")
    assert_uniform(4 * ((c >> np.uint32(bits - 1)) & np.uint32(1)) + both, 8, "the highest bit of c, t and t'")
    for output in outputs:
        assert_uniform(4 * (output & np.uint32(0x3F)) + both, 256, "a share of the result, t and t'")
        assert_uniform(4 * ((output >> np.uint32(14)) & np.uint32(0x3F)) + both, 256, "a share of the result, t and t'")


@pytest.mark.parametrize("ceiling", [None, 6 << 12])
def test_two_runs_on_one_secret_have_nothing_in_common(ceiling: int | None) -> None:
    values = np.full(64_000, 1234)
    first, second = (evaluate(values, 20, Result.WIDE, ceiling)[1] for _ in range(2))
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert_uniform(one ^ other, 256, "difference of two runs")


def test_each_piece_is_handed_out_once() -> None:
    pieces = OneTime({"relu1": 1, "relu2": 2})
    assert pieces.take("relu1") == 1
    with pytest.raises(SecrecyError, match="used already"):
        pieces.take("relu1")
    assert pieces.left == 1
    assert "2" not in repr(pieces).replace("pieces", "")


# --- maxima -------------------------------------------------------------------------------------------------------------


def gates_for(counts: list[int], bits: int) -> tuple[list[GateMaterial], list[GateMaterial]]:
    made = [materials(ComparisonGate(bits, count, Result.NARROW)) for count in counts]
    return [hospital for hospital, _, _ in made], [owner for _, owner, _ in made]


def run_with_gates(
    counts: list[int], bits: int, function: Callable[[bool, Callable[[np.ndarray], np.ndarray]], np.ndarray]
) -> np.ndarray:
    """Signed values of the shares that `function(first, relu)` returns at both; all gates must be used."""
    hospital, owner = gates_for(counts, bits)

    def party(first: bool, exchange: Exchange) -> np.ndarray:
        gates = hospital if first else owner
        return function(first, lambda share: compare(gates.pop(0), share, first, exchange))

    (one, other), _ = run_pair(party)
    assert not hospital and not owner
    opened = modulo((one + other).astype(np.int64), bits).astype(np.int64)
    return np.where(opened >= 1 << bits - 1, opened - (1 << bits), opened)


@given(st.data())
def test_max_pool_equals_torch(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([12, 20]))
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pads = data.draw(st.tuples(*(st.integers(0, size // 2) for size in (kernel[0], kernel[0], kernel[1], kernel[1]))))
    shape = (2, 3, data.draw(st.integers(4, 9)), data.draw(st.integers(4, 9)))
    seed = data.draw(st.integers(0, 1 << 16))
    bound = 1 << bits - 2
    values = np.random.default_rng(seed).integers(-bound + 1, bound, shape)
    layer = MaxPool("pool", ("x",), "y", 0, kernel, stride, pads)
    shares = split(values.transpose(0, 2, 3, 1), bits)
    counts = [shape[0] * count for count in max_pool_counts(layer, shape[1:])]
    got = run_with_gates(
        counts, bits, lambda first, relu: max_pool(layer, shares[0 if first else 1], bits, first, relu)
    )
    top, bottom, left, right = pads
    padded = torch.nn.functional.pad(torch.from_numpy(values).double(), (left, right, top, bottom), value=-float(bound))
    exact = torch.nn.functional.max_pool2d(padded, kernel, stride).numpy()
    assert np.array_equal(got.transpose(0, 3, 1, 2), exact)


@given(st.integers(1, 9), st.integers(0, 1 << 16))
def test_a_tournament_finds_the_maximum(candidates: int, seed: int) -> None:
    bound = 1 << 18
    values = np.random.default_rng(seed).integers(-bound, bound, (candidates, 7))
    shares = split(values, 20)
    pairs, remaining = [], candidates
    while remaining > 1:
        pairs.append(7 * (remaining // 2))
        remaining -= remaining // 2
    got = run_with_gates(pairs, 20, lambda first, relu: maximum(list(shares[0 if first else 1]), 20, relu))
    assert np.array_equal(got, values.max(axis=0))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.integers(-5, 99))
def test_sum_pool_equals_torch(kernel: int, stride: int, pad: int, multiplier: int) -> None:
    layer = AveragePool("pool", ("x",), "y", 0, (kernel, kernel), (stride, stride), (pad, 0, 0, pad), multiplier)
    values = np.random.default_rng(kernel).integers(-1000, 1000, (2, 5, 6, 3))
    padded = torch.nn.functional.pad(torch.from_numpy(values.transpose(0, 3, 1, 2)).double(), (0, pad, pad, 0))
    exact = torch.nn.functional.avg_pool2d(padded, kernel, stride, divisor_override=1).numpy() * multiplier
    hospital, owner = split(values, 32)
    got = (sum_pool(layer, hospital) + sum_pool(layer, owner)).view(np.int32).transpose(0, 3, 1, 2)
    assert np.array_equal(got, exact)
