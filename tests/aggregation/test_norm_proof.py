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


def nothing(parts: dict[str, Vector]) -> None:
    """An honest hospital changes nothing."""


def run(
    test: NormTest, sketch: torch.Tensor, number: int, lie: Callable[[dict[str, Vector]], None] = nothing
) -> tuple[bool, Vector]:
    """A proof about `sketch`, and the sum of the answers; `lie` changes parts after they were made as they should be."""
    size, stream = ProofSize(test, VERIFIERS), Seed(seed(number)).stream("shares")
    masks = [stream.ring_elements((BUCKETS,), test.ring_bits).to(test.dtype) for _ in range(VERIFIERS - 1)]
    shares = [*masks, sketch - sum(masks[1:], masks[0])]
    whole, carries = centred_sketch(test, [whole_numbers(share) for share in shares])
    parts = {"sketch": whole, "carries": carries}
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


def _other_sketch(parts: dict[str, Vector]) -> None:
    """It says everything of a sketch that is zero, but carries: they decide what its sketch is."""
    parts["sketch"] = parts["sketch"] * 0


def _carries_that_take_the_sketch_away(parts: dict[str, Vector]) -> None:
    """c / 2^k in the field makes the sketch vanish; it is no small number."""
    if "bits" not in parts:
        parts["carries"] = (parts["carries"] + parts["sketch"] * pow(2**32, -1, PRIME)) % PRIME
        parts["sketch"] = parts["sketch"] * 0


def _another_multiple(parts: dict[str, Vector]) -> None:
    """A sketch that is equal modulo 2^k, and longer: what it says is true, and too large."""
    if "bits" not in parts:
        parts["carries"] = parts["carries"] + 1
        parts["sketch"] = parts["sketch"] - (1 << 32)


def _bits_that_are_none(parts: dict[str, Vector]) -> None:
    """The slack as one large 'bit': its bits add up, and are not their own squares."""
    if "products" in parts or "bits" not in parts:
        return
    slack, size = -square_sum(parts["sketch"]), ProofSize(NormTest(BOUND, 32, BUCKETS), VERIFIERS)
    start = 40 * (size.carry_exponent + size.value_exponent + 2)
    parts["bits"] = parts["bits"].copy()
    parts["bits"][start : start + size.slack_bits] = 0
    parts["bits"][start] = (size.test.largest_square_sum + slack) % PRIME


def _products_that_add_up(parts: dict[str, Vector]) -> None:
    """Sums of squares that are small enough, although f(r) says otherwise."""
    if "products" in parts:
        parts["products"] = parts["products"].copy()
        parts["products"][1 : ROWS + 1] = 0


@pytest.mark.parametrize(
    "lie",
    [nothing, _other_sketch, _carries_that_take_the_sketch_away, _another_multiple, _bits_that_are_none, _products_that_add_up],
)  # fmt: skip
def test_a_hospital_beyond_the_bound_is_not_accepted(lie: Callable[[dict[str, Vector]], None]) -> None:
    """Each lie at several seeds; one that is found with probability 1/2 only would pass with 2^-39."""
    test = NormTest(BOUND, 32, BUCKETS)
    for number in range(10, 40, 10):
        sketch = torch.full((BUCKETS,), 1000, dtype=torch.int32)
        sketch[number] = 2**30
        assert not run(test, sketch, number, lie)[0], lie.__doc__


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
