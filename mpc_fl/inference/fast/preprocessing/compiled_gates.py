"""Corrections of comparison gates by the library in C, and how it is told of a gate: for the dealer, and for `online`.

The sources are mpc_fl/inference/fast/kernels/native/gates.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from mpc_fl.inference.fast.kernels.compiled import InstructionSet
from mpc_fl.inference.fast.preprocessing.gate_correlation import ComparisonGate, Corrected, Drawn, Result


class _Gate(ctypes.Structure):
    """`gate` of native/gates.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("count", "words", "bits", "compared", "digits", "first", "top")]


class _CorrectionWork(ctypes.Structure):
    """`correction_work` of native/gates.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("c_input_mask", "s_input_mask", "c_masks", "s_masks", "c_result_mask", "s_result_mask"),
            *("tables", "products", "w", "wr", "kappa", "both", "other", "at_zero", "at_one"),
        )
    ]


def compiled_correction(by: InstructionSet) -> Callable[[ComparisonGate, Drawn, Drawn, Corrected], None]:
    """What `gate_correction.correct` does with numpy, by one instruction set."""

    def correct(gate: ComparisonGate, c: Drawn, s: Drawn, result: Corrected) -> None:
        names = ("at_zero", "at_one") if gate.result is Result.EXTENDED else ("w", "wr", "kappa", "both", "other")
        kept = []
        work = _CorrectionWork()
        for party, drawn in (("c", c), ("s", s)):
            for name in ("input_mask", "masks", "result_mask"):
                kept.append(plain(getattr(drawn, name)))
                setattr(work, f"{party}_{name}", kept[-1].ctypes.data)
        for name, array in (
            ("tables", result.tables),
            ("products", result.products),
            *zip(names, result.arrays, strict=False),
        ):
            if not (array.flags.c_contiguous and array.flags.aligned and array.flags.writeable):
                raise ValueError("a correction is not made in an array of this layout")
            setattr(work, name, array.ctypes.data)
        by.library.ring_kernels_correct(by.number, described_gate(gate, True), ctypes.byref(work))

    return correct


def described_gate(gate: ComparisonGate, first: bool) -> ctypes.Array[_Gate]:
    extended = gate.result is Result.EXTENDED
    described = (_Gate * 1)()  # an array passes as a pointer, and keeps its memory as long as it is one
    compared = gate.bits if extended else gate.bits - 1
    described[0] = _Gate(gate.count, gate.words, gate.bits, compared, len(gate.digits), first, first and not extended)
    return described


def plain(array: np.ndarray) -> np.ndarray:
    """The same elements side by side and aligned, as C expects them: nearly always the array itself."""
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))
