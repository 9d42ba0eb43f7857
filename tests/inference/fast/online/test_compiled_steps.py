"""Compiled steps of a comparison gate are those of numpy, byte for byte, and wrong ones are never used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.inference.fast.kernels import compiled
from mpc_fl.inference.fast.kernels.bit_planes import Planes
from mpc_fl.inference.fast.online import comparison
from mpc_fl.inference.fast.online.comparison import NumpySteps, everything_computed, fastest_steps, same_steps
from mpc_fl.inference.fast.online.compiled_steps import CompiledSteps
from mpc_fl.inference.fast.preprocessing.gate_correlation import ComparisonGate, Result
from tests.inference.fast.online.test_comparison import around, boundaries, ceilings, check, materials
from tests.support.compiled_kernels import SETS, needs_library


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    fastest_steps.cache_clear()
    yield
    fastest_steps.cache_clear()


@needs_library
@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(8, 24),
    count=st.one_of(st.integers(1, 140), st.integers(1, 3000)),
    result=st.sampled_from(list(Result)),
    data=st.data(),
    first=st.booleans(),
    key=st.binary(min_size=32, max_size=32),
)
def test_every_message_and_result_is_that_of_numpy(
    bits: int, count: int, result: Result, data: st.DataObject, first: bool, key: bytes
) -> None:
    ceiling = None if result is Result.EXTENDED else data.draw(st.one_of(st.none(), ceilings(bits)))
    gate = ComparisonGate(bits, count, result, ceiling)
    expected = everything_computed(NumpySteps(), gate, first, key)
    for by in SETS:
        found = everything_computed(CompiledSteps(by), gate, first, key)
        assert [array.dtype for array in found] == [array.dtype for array in expected]
        for step, pair in enumerate(zip(found, expected, strict=True)):
            assert np.array_equal(*pair), (by.name, step)


@needs_library
@pytest.mark.parametrize("result", Result)
@pytest.mark.parametrize("number", range(len(SETS)))
def test_gates_are_right_with_every_instruction_set(
    number: int, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of both parties' computation, not only that it is numpy's."""
    monkeypatch.setattr(comparison, "fastest_steps", lambda: CompiledSteps(SETS[number]))
    for bits in (8, 13, 16, 20, 24):
        check(np.array(boundaries(bits) * 3), bits, result)
        if result is not Result.EXTENDED:
            for ceiling in (6 << bits - 5, 11):
                check(np.tile(around(bits, ceiling), 3), bits, result, ceiling)


@needs_library
def test_one_party_may_have_kernels_and_the_other_none(monkeypatch: pytest.MonkeyPatch) -> None:
    both = iter([CompiledSteps(SETS[0]), NumpySteps()] * 2)
    monkeypatch.setattr(comparison, "fastest_steps", lambda: next(both))
    check(np.arange(-(1 << 9), 1 << 9), 20, Result.WIDE)
    check(np.arange(-(1 << 9), 1 << 9), 20, Result.WIDE, 3 << 7)


@needs_library
def test_arrays_that_do_not_lie_as_c_expects_are_copied() -> None:
    gate = ComparisonGate(17, 200, Result.WIDE)
    hospital, _, _ = materials(gate)
    steps, share = CompiledSteps(SETS[0]), np.arange(400, dtype=np.uint32)[::2]
    expected = NumpySteps().masked_input(hospital, share, True)
    for found, right in zip(steps.masked_input(hospital, share, True), expected, strict=True):
        assert np.array_equal(found, right)


@needs_library
def test_a_message_of_another_size_is_refused() -> None:
    gate = ComparisonGate(17, 200, Result.NARROW)
    hospital, _, _ = materials(gate)
    steps = CompiledSteps(SETS[0])
    mine, message = steps.masked_input(hospital, np.zeros(200, dtype=np.uint32), True)
    with pytest.raises(ValueError, match="another size"):
        steps.masked_digits(hospital, mine, message[:-1], True)


class _Wrong(CompiledSteps):
    def masked_borrows(self, *arguments: object) -> Planes:
        planes = super().masked_borrows(*arguments)  # type: ignore[arg-type]
        planes[-1, -1] ^= 1
        return planes


@needs_library
def test_wrong_steps_are_found_and_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh_choice: None
) -> None:
    assert same_steps(CompiledSteps(SETS[0])) and not same_steps(_Wrong(SETS[0]))
    monkeypatch.setattr(compiled, "kernels", lambda: compiled.Kernels(SETS[0]))
    monkeypatch.setattr(comparison, "CompiledSteps", _Wrong)
    with caplog.at_level("WARNING"):
        assert isinstance(fastest_steps(), NumpySteps)
    assert f"by {SETS[0].name} are wrong" in caplog.text


def test_without_kernels_numpy_does_it(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setattr(compiled, "kernels", lambda: compiled.Kernels(None, "a test"))
    assert isinstance(fastest_steps(), NumpySteps)
