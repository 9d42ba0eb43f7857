"""Corrections of comparison gates by the library in C, and how it is told of a gate: for the dealer, and for `online`.

The sources are mpc_fl/inference/fast/kernels/native/gates.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from mpc_fl.inference.fast.kernels.compiled import InstructionSet
from mpc_fl.inference.fast.preprocessing.gate_correlation import (
    MOST_DIGITS,
    ComparisonGate,
    Corrected,
    Drawn,
    Result,
)


class _Gate(ctypes.Structure):
    """`gate` of native/gates.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "words", "bits", "digits", "first")),
        *((name, ctypes.c_int64) for name in ("thresholds", "ceiling", "common", "products")),
        ("sizes", ctypes.c_int64 * MOST_DIGITS),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("mask_rows", "product_rows")),
    ]


class _CorrectionWork(ctypes.Structure):
    """`correction_work` of native/gates.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("c_input_mask", "s_input_mask", "c_masks", "s_masks", "c_result_masks", "s_result_masks"),
            *("tables", "products", "w", "wr", "reached", "kappa", "both", "other", "at_zero", "at_one"),
        )
    ]


def compiled_correction(by: InstructionSet) -> Callable[[ComparisonGate, Drawn, Drawn, Corrected], None]:
    """What `gate_correction.correct` does with numpy, by one instruction set."""

    def correct(gate: ComparisonGate, c: Drawn, s: Drawn, result: Corrected) -> None:
        kept = []
        work = _CorrectionWork()
        for party, drawn in (("c", c), ("s", s)):
            for name in ("input_mask", "masks", "result_masks"):
                kept.append(plain(getattr(drawn, name)))
                setattr(work, f"{party}_{name}", kept[-1].ctypes.data)
        for name, array in (
            ("tables", result.tables),
            ("products", result.products),
            *zip(word_names(gate), result.arrays, strict=True),
        ):
            if not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable):
                raise ValueError("a correction is not made in an array of this layout")
            setattr(work, name, array.ctypes.data)
        by.library.ring_kernels_correct(by.number, described_gate(gate, True), ctypes.byref(work))

    return correct


def word_names(gate: ComparisonGate) -> tuple[str, ...]:
    """What native/gates.h calls the corrected words of a gate, in the order of `ComparisonGate.word_dtypes`."""
    if gate.result is Result.EXTENDED:
        return "at_zero", "at_one"
    whole = ("w", "wr") if gate.ceiling is None else ("w", "wr", "reached")
    return whole if gate.result is Result.NARROW else (*whole, "kappa", "both", "other")


def described_gate(gate: ComparisonGate, first: bool) -> ctypes.Array[_Gate]:
    described = (_Gate * 1)()  # an array passes as a pointer, and keeps its memory as long as it is one
    to = described[0]
    to.count, to.words, to.bits, to.digits = gate.count, gate.words, gate.bits, len(gate.digits)
    to.first, to.thresholds, to.ceiling, to.common = first, len(gate.thresholds), gate.ceiling or 0, gate.common
    to.products, to.sizes[: len(gate.digits)] = len(gate.product_rows[0]) if gate.thresholds else 0, gate.digits
    to.mask_rows, to.product_rows = _rows(gate.mask_rows), _rows(gate.product_rows)
    return described


def _rows(of_thresholds: tuple[tuple[int, ...], ...]) -> ctypes.Array[ctypes.c_int64]:
    rows = [row for each in of_thresholds for row in each]
    return (ctypes.c_int64 * len(rows))(*rows)


def plain(array: np.ndarray) -> np.ndarray:
    """The same elements side by side and aligned, as C expects them: nearly always the array itself."""
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))
