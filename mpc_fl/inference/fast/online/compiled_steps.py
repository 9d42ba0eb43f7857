"""The local steps of a comparison gate by the library in C: what `comparison` does with numpy, byte for byte.

A step takes some nanoseconds a gate instead of tens, because nothing between its input and its output goes through memory.
The sources are mpc_fl/inference/fast/kernels/native/gates.c. The functions have the signatures of those that they replace.
"""

from __future__ import annotations

import ctypes

import numpy as np

from mpc_fl.inference.fast.kernels.bit_planes import Planes, packed_bytes
from mpc_fl.inference.fast.kernels.compiled import InstructionSet
from mpc_fl.inference.fast.preprocessing.compiled_gates import described_gate, plain, word_names
from mpc_fl.inference.fast.preprocessing.gate_correlation import GateMaterial, Result


class _RectifierWork(ctypes.Structure):
    """`rectifier_work` of native/gates.h."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("opened", "input_mask", "w", "wr", "reached", "kappa", "both", "other", "t", "result")
    ]


class _ExtensionWork(ctypes.Structure):
    """`extension_work` of native/gates.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("opened", "input_mask", "at_zero", "at_one", "result")]


class CompiledSteps:
    """The steps by one instruction set."""

    def __init__(self, by: InstructionSet) -> None:
        self._library, self._set = by.library, by.number

    def masked_input(self, material: GateMaterial, share: np.ndarray, first: bool) -> tuple[np.ndarray, np.ndarray]:
        """x + r modulo 2^k of this party, uint32 (count,), and packed, uint8."""
        gate, mask = material.gate, plain(material.drawn.input_mask)
        share, more = plain(share), 1 << gate.bits - 2 if first and gate.result is Result.EXTENDED else 0
        mine = np.empty(gate.count, dtype=np.uint32)
        message = np.empty(packed_bytes(gate.bits, gate.count), dtype=np.uint8)
        arrays = (share.ctypes.data, mask.ctypes.data, more, mine.ctypes.data, message.ctypes.data)
        self._library.ring_kernels_open_input(self._set, described_gate(gate, first), *arrays)
        return mine, message

    def masked_digits(
        self, material: GateMaterial, mine: np.ndarray, theirs: np.ndarray, first: bool
    ) -> tuple[np.ndarray, Planes]:
        """c, uint32 (count,), in the place of `mine`, and the masked digits (masks, words)."""
        gate = material.gate
        if theirs.dtype != np.uint8 or theirs.shape != (packed_bytes(gate.bits, gate.count),):
            raise ValueError("a masked input has another size than the gate needs")
        theirs, tables, masks = plain(theirs), plain(material.corrected.tables), plain(material.drawn.masks)
        masked = np.empty((gate.masks, gate.words), dtype=np.uint64)
        arrays = [array.ctypes.data for array in (theirs, mine, tables, masks, masked)]
        self._library.ring_kernels_look_up(self._set, described_gate(gate, first), *arrays)
        return mine, masked

    def masked_borrows(self, material: GateMaterial, opened: np.ndarray, masked: Planes, first: bool) -> Planes:
        """This party's shares of t (thresholds, words)."""
        gate = material.gate
        products, masks = plain(material.corrected.products), plain(material.drawn.masks)
        result_masks = plain(material.drawn.result_masks)
        result = np.empty((len(gate.thresholds), gate.words), dtype=np.uint64)
        arrays = [array.ctypes.data for array in (opened, products, masks, masked, result_masks, result)]
        self._library.ring_kernels_borrow(self._set, described_gate(gate, first), *arrays)
        return result

    def result(self, material: GateMaterial, opened: np.ndarray, t: Planes, first: bool) -> np.ndarray:
        """This party's share of the gate's result, uint32 (count,)."""
        gate, described = material.gate, described_gate(material.gate, first)
        result, mask = np.empty(gate.count, dtype=np.uint32), plain(material.drawn.input_mask)
        words = [plain(array) for array in material.corrected.arrays]
        places = dict(zip(word_names(gate), (array.ctypes.data for array in words), strict=True))
        ends = {"opened": opened.ctypes.data, "result": result.ctypes.data}
        if gate.result is Result.EXTENDED:
            extension = _ExtensionWork(input_mask=mask.ctypes.data, **ends, **places)
            self._library.ring_kernels_extend(self._set, described, ctypes.byref(extension))
        else:
            rectifier = _RectifierWork(input_mask=mask.ctypes.data, t=t.ctypes.data, **ends, **places)
            self._library.ring_kernels_rectify(self._set, described, ctypes.byref(rectifier))
        return result
