"""Compiled corrections of gates are those of numpy, byte for byte, and wrong ones are never used."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.inference.fast.kernels import compiled
from mpc_fl.inference.fast.preprocessing import gate_correction
from mpc_fl.inference.fast.preprocessing.compiled_gates import compiled_correction
from mpc_fl.inference.fast.preprocessing.gate_correction import correct, correction_by, same_correction
from mpc_fl.inference.fast.preprocessing.gate_correlation import (
    ComparisonGate,
    Corrected,
    Drawn,
    Result,
    corrected_from,
    draw,
)
from tests.inference.fast.online.test_comparison import ceilings
from tests.support.compiled_kernels import SETS, needs_library


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    gate_correction.fastest_correction.cache_clear()
    yield
    gate_correction.fastest_correction.cache_clear()


@needs_library
@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(8, 24),
    count=st.one_of(st.integers(1, 140), st.integers(1, 3000)),
    result=st.sampled_from(list(Result)),
    data=st.data(),
    key=st.binary(min_size=32, max_size=32),
)
def test_every_correction_is_that_of_numpy(
    bits: int, count: int, result: Result, data: st.DataObject, key: bytes
) -> None:
    ceiling = None if result is Result.EXTENDED else data.draw(st.one_of(st.none(), ceilings(bits)))
    gate = ComparisonGate(bits, count, result, ceiling)
    expected = correction_by(correct, gate, key)
    for by in SETS:
        assert np.array_equal(correction_by(compiled_correction(by), gate, key), expected), by.name


def _wrong(gate: ComparisonGate, c: Drawn, s: Drawn, result: Corrected) -> None:
    correct(gate, c, s, result)
    result.products[-1, -1] ^= 1


@needs_library
def test_wrong_corrections_are_found_and_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fresh_choice: None
) -> None:
    assert same_correction(compiled_correction(SETS[0])) and not same_correction(_wrong)
    monkeypatch.setattr(compiled, "kernels", lambda: compiled.Kernels(SETS[0]))
    monkeypatch.setattr(gate_correction, "compiled_correction", lambda by: _wrong)
    with caplog.at_level("WARNING"):
        assert gate_correction.fastest_correction() is correct
    assert f"by {SETS[0].name} are wrong" in caplog.text


def test_without_kernels_numpy_does_it(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setattr(compiled, "kernels", lambda: compiled.Kernels(None, "a test"))
    assert gate_correction.fastest_correction() is correct


@needs_library
def test_a_correction_is_not_made_where_c_could_not_write_it() -> None:
    gate, seed = ComparisonGate(20, 70, Result.WIDE), Seed.from_system()
    stream = seed.stream("C")
    drawn = draw(gate, stream), draw(gate, seed.stream("S"))
    share = stream.words(gate.correction_bytes, np.uint8)
    share.flags.writeable = False
    with pytest.raises(ValueError, match="layout"):
        compiled_correction(SETS[0])(gate, *drawn, corrected_from(gate, share))
