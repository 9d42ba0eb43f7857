"""Proofs about the norm of a sketch: honest ones are accepted always, false ones never, and answers show nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.aggregation.norm_limits import NormTest
from mpc_fl.aggregation.norm_proof import (
    ROWS,
    ProofSize,
    VerifierShare,
    accepted,
    answers_of,
    bits_of,
    centred_sketch,
    draw_point,
    draw_projections,
    draw_weights,
    products_of,
    square_sum,
    whole_numbers,
)
from mpc_fl.aggregation.prime_field import (
    PRIME,
    Vector,
    centred,
    combination,
    from_words,
    interpolation,
    small_combinations,
    to_words,
    uniform,
    vector,
)
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ProtocolError

BUCKETS, VERIFIERS = 256, 3
BOUND = 1000.0


def seed(number: int) -> bytes:
    return number.to_bytes(32, "little")


def nothing(parts: dict[str, Any]) -> None:
    """An honest hospital changes nothing."""


def run(
    test: NormTest,
    sketch: torch.Tensor,
    number: int,
    lie: Callable[[dict[str, Any]], None] = nothing,
    size_of: type[ProofSize] = ProofSize,
) -> tuple[bool, Vector]:
    """A proof about `sketch`, and the sum of the answers; `lie` changes parts after they were made as they should be."""
    size, stream = size_of(test, VERIFIERS), Seed(seed(number)).stream("shares")
    masks = [stream.ring_elements((BUCKETS,), test.ring_bits).to(test.dtype) for _ in range(VERIFIERS - 1)]
    shares = [*masks, sketch - sum(masks[1:], masks[0])]
    whole, carries = centred_sketch(test, [whole_numbers(share) for share in shares])
    parts: dict[str, Any] = {"sketch": whole, "carries": carries, "number": number}
    lie(parts)
    projections = draw_projections(seed(number + 1), BUCKETS)
    parts["bits"] = bits_of(size, projections, parts["sketch"], parts["carries"])
    lie(parts)
    first_row = uniform(stream, size.columns)
    weights = draw_weights(seed(number + 2), size)
    parts["products"] = products_of(size, weights, parts["sketch"], parts["bits"], first_row)
    lie(parts)
    point = draw_point(seed(number + 3))
    witness = []
    for values in (parts["carries"] % PRIME, parts["bits"], first_row, parts["products"]):
        drawn = [uniform(stream, len(values)) for _ in range(VERIFIERS - 1)]
        witness.append([*drawn, (values - sum(drawn[1:], drawn[0])) % PRIME])
    answers = [
        answers_of(size, projections, weights, point, VerifierShare.of(test, whole_numbers(share), [w[j] for w in witness]), j == 0)
        for j, share in enumerate(shares)
    ]  # fmt: skip
    return accepted(size, weights, answers), sum(answers[1:], answers[0]) % PRIME


def sketch_of(square: int, ring_bits: Literal[32, 64]) -> torch.Tensor:
    """A sketch whose squares add up to exactly this."""
    values, rest = [], square
    while rest:
        values.append(int(rest**0.5))
        rest -= values[-1] ** 2
    sketch = torch.zeros(BUCKETS, dtype=torch.int64)
    sketch[: len(values)] = torch.tensor(values)
    return sketch.to(torch.int32 if ring_bits == 32 else torch.int64)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 60), st.sampled_from([32, 64]), st.floats(0.0, 1.0))
def test_a_hospital_within_the_bound_is_accepted(number: int, ring_bits: Literal[32, 64], part: float) -> None:
    test = NormTest(BOUND, ring_bits, BUCKETS)
    normal = torch.randn(BUCKETS, generator=torch.Generator().manual_seed(number)).double()
    longest = part * test.largest_square_sum**0.5
    sketch = (normal / normal.norm() * longest).trunc().to(test.dtype)
    assert test.passes(sketch) and run(test, sketch, number)[0]


@pytest.mark.parametrize("ring_bits", [32, 64])
def test_the_bound_itself_passes_and_one_more_does_not(ring_bits: Literal[32, 64]) -> None:
    test = NormTest(BOUND, ring_bits, BUCKETS)
    largest = test.largest_square_sum
    assert run(test, sketch_of(largest, ring_bits), 1)[0]
    assert not run(test, sketch_of(largest + 1, ring_bits), 2)[0]
    assert square_sum(sketch_of(largest + 1, ring_bits).numpy().astype(object)) == largest + 1


def _other_sketch(parts: dict[str, Any]) -> None:
    """It says everything of a sketch that is zero, but carries: they decide what its sketch is."""
    parts["sketch"] = parts["sketch"] * 0


def _carries_that_take_the_sketch_away(parts: dict[str, Any]) -> None:
    """c / 2^k in the field makes the sketch vanish; it is no small number."""
    if "bits" not in parts:
        parts["carries"] = (parts["carries"] + parts["sketch"] * pow(2**32, -1, PRIME)) % PRIME
        parts["sketch"] = parts["sketch"] * 0


def _another_multiple(parts: dict[str, Any]) -> None:
    """A sketch that is equal modulo 2^k, and longer: what it says is true, and too large."""
    if "bits" not in parts:
        parts["carries"] = parts["carries"] + 1
        parts["sketch"] = parts["sketch"] - (1 << 32)


SIZE = ProofSize(NormTest(BOUND, 32, BUCKETS), VERIFIERS)
SLACK = slice(40 * (SIZE.carry_exponent + SIZE.value_exponent + 2), None)  # where the bits of A - |V|^2 begin


def _a_slack_that_is_no_bit(parts: dict[str, Any]) -> None:
    """A - |V|^2 < 0 as one 'bit': bits add up, but are not their own squares."""
    if "bits" in parts and "products" not in parts:
        parts["bits"] = parts["bits"].copy()
        parts["bits"][SLACK] = 0
        parts["bits"][SLACK.start] = (SIZE.test.largest_square_sum - square_sum(parts["sketch"])) % PRIME


def _squares_of_bits_that_are_none(parts: dict[str, Any]) -> None:
    """The same, and h(l) in every row is what it were if they were bits: another polynomial than f(r) says."""
    _a_slack_that_is_no_bit(parts)
    if "products" in parts:
        weights, rows = draw_weights(seed(parts["number"] + 2), SIZE), parts["bits"].reshape(ROWS, -1)
        parts["products"] = parts["products"].copy()
        parts["products"][2 * ROWS + 2 : 3 * ROWS + 2] = rows.dot(weights) % PRIME


def _sums_of_squares_that_are_none(parts: dict[str, Any]) -> None:
    """The slack is A, and g is zero in every row: another polynomial than f(r) says."""
    if "products" in parts:
        parts["products"] = parts["products"].copy()
        parts["products"][1 : ROWS + 1] = 0
    elif "bits" in parts:
        parts["bits"] = parts["bits"].copy()
        parts["bits"][SLACK] = 0
        for place in range(SIZE.slack_bits):
            parts["bits"][SLACK.start + place] = SIZE.test.largest_square_sum >> place & 1


@pytest.mark.parametrize("lie", [nothing, _other_sketch, _carries_that_take_the_sketch_away, _another_multiple])
def test_a_hospital_far_beyond_the_bound_is_not_accepted(lie: Callable[[dict[str, Any]], None]) -> None:
    """Each lie at several seeds; one that is found with probability 1/2 only would pass with 2^-39."""
    for number in range(10, 40, 10):
        sketch = torch.full((BUCKETS,), 1000, dtype=torch.int32)
        sketch[number] = 2**30
        assert not run(SIZE.test, sketch, number, lie)[0], lie.__doc__


@pytest.mark.parametrize(
    "lie", [nothing, _a_slack_that_is_no_bit, _squares_of_bits_that_are_none, _sums_of_squares_that_are_none]
)
def test_a_hospital_a_little_beyond_the_bound_is_not_accepted(lie: Callable[[dict[str, Any]], None]) -> None:
    """Everything is in range and fits together but for one identity, another one for each lie."""
    for number in range(10, 40, 10):
        assert not run(SIZE.test, sketch_of(2 * SIZE.test.largest_square_sum, 32), number, lie)[0], lie.__doc__


class Narrow(ProofSize):
    """A range so small that sketches within the norm are beyond it: what wraps modulo p would have to be found by it."""

    @property
    def value_exponent(self) -> int:
        return 6


def test_a_bucket_out_of_range_is_found() -> None:
    """Where buckets are of 64 bits, carries of either sign leave room for squares that wrap; the range does not."""
    test = NormTest(BOUND, 64, BUCKETS)
    short, long = sketch_of(1, 64), sketch_of(900**2, 64)
    for number in range(10, 40, 10):
        assert run(test, short, number, size_of=Narrow)[0]
        assert test.passes(long) and not run(test, long, number, size_of=Narrow)[0]


def test_what_is_opened_is_uniform_and_does_not_depend_on_the_sketch() -> None:
    """f_i(r) of a sketch of zeros and of one at the bound: each column uniform over fresh rows 0, and the rest follows."""
    test = NormTest(BOUND, 32, BUCKETS)
    size = ProofSize(test, VERIFIERS)
    for sketch in (sketch_of(0, 32), sketch_of(test.largest_square_sum, 32)):
        opened = np.stack([run(test, sketch, 100 * number)[1] for number in range(1, 13)])
        assert (opened[:, -1] == 0).all()
        at_point = opened[:, : size.columns]
        halves = np.array([[value > PRIME // 2 for value in row] for row in at_point]).mean()
        assert len(set(at_point.reshape(-1).tolist())) == at_point.size
        assert abs(halves - 0.5) < 6 / (4 * at_point.size) ** 0.5


def test_a_point_that_opens_a_row_is_refused(monkeypatch: Any) -> None:
    from mpc_fl.aggregation import norm_proof

    for at in (0, 1, 2 * ROWS):
        monkeypatch.setattr(norm_proof, "uniform", lambda stream, count, at=at: vector([at] * count))
        with pytest.raises(ProtocolError, match="open a row"):
            draw_point(seed(1))


# -- the field


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, PRIME - 1), min_size=1, max_size=9), st.integers(9, PRIME - 1))
def test_a_polynomial_is_known_from_its_values(coefficients: list[int], at: int) -> None:
    def value(x: int) -> int:
        return sum(c * pow(x, power, PRIME) for power, c in enumerate(coefficients)) % PRIME

    values = vector(value(point) for point in range(len(coefficients)))
    assert combination(interpolation(len(values), at), values) == value(at)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, PRIME - 1), min_size=1, max_size=20), st.integers(0, 1 << 30))
def test_elements_cross_a_link_and_combine_exactly(numbers: list[int], number: int) -> None:
    elements = vector(numbers)
    assert from_words(to_words(elements), "x").tolist() == numbers
    matrix = np.random.default_rng(number).integers(-1, 2, (3, len(numbers)))
    expected = [sum(int(q) * n for q, n in zip(row, numbers, strict=True)) % PRIME for row in matrix]
    assert small_combinations(matrix, elements).tolist() == expected
    assert centred(PRIME - 5) == -5 and centred(5) == 5


def test_what_is_no_element_is_refused_by_name() -> None:
    good = to_words(vector([1, 2]))
    bad = [
        good.int(),
        good[:, :1],
        good.reshape(-1),
        torch.full((1, 2), -1),
        to_words(vector([0])) + torch.tensor([-1, 2**63 - 1]),
    ]
    for words in bad:  # fmt: skip
        with pytest.raises(ProtocolError, match="hospital-7 sent something else"):
            from_words(words, "hospital-7")
