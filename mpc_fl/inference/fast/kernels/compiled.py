"""Convolutions modulo 2^32 by a library in C, where one was built: the sources are in `native`.

Its products are those of 32-bit vectors, eight at a time with AVX2 and sixteen with AVX-512, so nothing is cut into limbs and
no patches are unfolded. The library holds code for several instruction sets; the best one of this processor that agrees with
torch's int64 arithmetic on random and extreme values is taken, of those that were ever tried. Without the library all else works
as it did, more slowly.

The environment variable MPC_FL_KERNELS says what may be used on this machine: `off`, or the name of one instruction set
(`avx512`, `avx2`, `neon`, `generic`). It is no setting of a run: results are the same bit by bit.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import functional

from mpc_fl.errors import ConfigError, printable

log = logging.getLogger(__name__)
T = TypeVar("T")
Pair = tuple[int, int]

VARIABLE = "MPC_FL_KERNELS"
_OFF = "off"
_NAMES = ("avx512", "avx2", "neon", "generic")
_UNTRIED = ("neon",)  # never run on such a processor by us: taken only where MPC_FL_KERNELS names it
_LIBRARY = Path(__file__).with_name("native") / "ring_kernels.so"
_INTERFACE = 2  # as in native/ring_kernels.h
_PANEL = 16
_MULTIPLY_ADDS_PER_THREAD = 1 << 20  # a thread takes some 20 microseconds to start, and as many to compute these


class _Layer(ctypes.Structure):
    """`convolution` of native/ring_kernels.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("images", "rows", "columns", "channels"),
            *("outputs", "groups", "depthwise"),
            *("kernel_rows", "kernel_columns", "stride_rows", "stride_columns"),
            *("dilation_rows", "dilation_columns", "result_rows", "result_columns"),
        )
    ]


@dataclass(frozen=True)
class InstructionSet:
    """One way through the library that this processor has."""

    name: str
    number: int
    library: ctypes.CDLL


@dataclass(frozen=True)
class Kernels:
    """What is used on this machine, or None and why not."""

    used: InstructionSet | None
    why_not: str = ""

    def __str__(self) -> str:
        return f"compiled, {self.used.name}" if self.used else f"torch and numpy ({self.why_not})"


@functools.cache
def kernels() -> Kernels:
    """What this process uses, found at the first call, within some 10 ms. Raises `ConfigError` for a wrong MPC_FL_KERNELS."""
    return _choice(os.environ)


def _choice(environment: Mapping[str, str]) -> Kernels:
    wanted = environment.get(VARIABLE, "")
    if wanted not in ("", _OFF, *_NAMES):
        raise ConfigError(
            f"{VARIABLE} is '{printable(wanted, 40)}'",
            f"set it to {_OFF} or one of {', '.join(_NAMES)}, or leave it out",
        )
    if wanted == _OFF:
        return Kernels(None, f"{VARIABLE} is {_OFF}")
    library, why_not = _load(_LIBRARY)
    if library is None:
        if wanted:
            raise ConfigError(f"{VARIABLE} is {wanted}, but {why_not}", f"build the library, or leave out {VARIABLE}")
        return Kernels(None, why_not)
    sets = instruction_sets(library, wanted)
    if not sets:
        raise ConfigError(f"{VARIABLE} is {wanted}, which this processor does not have", f"leave out {VARIABLE}")
    for each in sets:
        if _passes_self_test(each):
            return Kernels(each)
        log.warning("compiled kernels by %s give wrong results on this machine, a slower way is used", each.name)
    return Kernels(None, "they failed their self-test")


def by_kernels(what: str, slower: T, compiled: Callable[[InstructionSet], T], is_same: Callable[[T], bool]) -> T:
    """What computes `what` here: the compiled way, where there is one and `is_same` finds it to do what `slower` does."""
    used = kernels().used
    if used is None:
        return slower
    found = compiled(used)
    if not is_same(found):
        log.warning("compiled %s by %s are wrong on this machine, a slower way is used", what, used.name)
        return slower
    return found


def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why."""
    if not path.exists():
        return None, "no kernels were built when mpc-fl was installed, for want of a C compiler"
    try:
        library = ctypes.CDLL(str(path))
        if library.ring_kernels_interface() != _INTERFACE:
            return None, f"{path.name} was built from other sources: install mpc-fl again"
        _declare(library)
    except (OSError, AttributeError):
        return None, f"{path.name} is no library of these sources for this machine: install mpc-fl again"
    return library, ""


def _declare(library: ctypes.CDLL) -> None:
    """Say what the functions take, as native/*.h do. Raises `AttributeError` where one is missing."""
    library.ring_kernels_name.restype = ctypes.c_char_p
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.ring_kernels_convolve.argtypes = [number, pointer, pointer, pointer, pointer, number]
    library.ring_kernels_open_input.argtypes = [number, pointer, pointer, pointer, ctypes.c_uint32, pointer, pointer]
    library.ring_kernels_look_up.argtypes = [number, *(pointer,) * 6]
    library.ring_kernels_borrow.argtypes = [number, *(pointer,) * 7]
    for function in (library.ring_kernels_rectify, library.ring_kernels_extend, library.ring_kernels_correct):
        function.argtypes = [number, pointer, pointer]


def instruction_sets(library: ctypes.CDLL, wanted: str = "") -> list[InstructionSet]:
    """Those that this processor has, the best first: the one that is wanted, or all but those that were never tried."""
    found: list[InstructionSet] = []
    while (name := library.ring_kernels_name(len(found))) is not None:
        found.append(InstructionSet(name.decode(), len(found), library))
    here = [each for each in found if library.ring_kernels_supported(each.number)]
    return [each for each in here if each.name == wanted or (not wanted and each.name not in _UNTRIED)]


class CompiledConvolution:
    """A convolution with fixed weights, int32 (O, I / groups, kernel height, width), packed for the library.

    Calling it with int32 (N, I, H, W) gives int32 (N, O, H', W') modulo 2^32, channels last in memory; such inputs are
    fastest. It uses as many threads as torch does. Raises `MemoryError` when the library has none.
    """

    def __init__(
        self, by: InstructionSet, weights: torch.Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
    ) -> None:
        self._by, self._padding = by, padding
        self._outputs, width, *kernel = weights.shape
        self._depthwise = width == 1 and groups == self._outputs and groups > 1
        self._layer = _Layer(
            outputs=self._outputs,
            groups=1 if self._depthwise else groups,
            depthwise=self._depthwise,
            kernel_rows=kernel[0],
            kernel_columns=kernel[1],
            stride_rows=stride[0],
            stride_columns=stride[1],
            dilation_rows=dilation[0],
            dilation_columns=dilation[1],
        )
        self._multiply_adds_per_pixel = weights.numel()
        # (groups, outputs of one, ...): a depthwise layer's outputs are those of one group.
        parts = weights.reshape(self._layer.groups, -1, width, *kernel)
        parts = functional.pad(parts, (0, 0, 0, 0, 0, 0, 0, -parts.shape[1] % _PANEL))
        panels = parts.reshape(self._layer.groups, -1, _PANEL, width, *kernel)
        self._weights = panels.permute(0, 1, 4, 5, 3, 2).contiguous()

    def __call__(self, activations: torch.Tensor, result_size: Pair) -> torch.Tensor:
        """The convolution; `result_size` is H', W'."""
        images, (rows, columns) = self._padded(activations), result_size
        count = len(images)
        result = torch.empty(count, rows, columns, self._outputs, dtype=torch.int32)
        layer = _Layer.from_buffer_copy(self._layer)
        layer.images, layer.rows, layer.columns, layer.channels = images.shape
        layer.result_rows, layer.result_columns = rows, columns
        work = count * rows * columns * self._multiply_adds_per_pixel
        threads = max(1, min(torch.get_num_threads(), work // _MULTIPLY_ADDS_PER_THREAD))
        pointers = (images.data_ptr(), self._weights.data_ptr(), result.data_ptr())
        if self._by.library.ring_kernels_convolve(self._by.number, ctypes.byref(layer), *pointers, threads):
            raise MemoryError("no memory for a convolution")
        return result.permute(0, 3, 1, 2)

    def _padded(self, activations: torch.Tensor) -> torch.Tensor:
        """(N, H + padding, W + padding, I), contiguous; a depthwise layer's channels are filled up to whole panels."""
        pixels, (vertical, horizontal) = activations.permute(0, 2, 3, 1), self._padding
        more = -pixels.shape[-1] % _PANEL if self._depthwise else 0
        if not (more or vertical or horizontal):
            return pixels.contiguous()
        count, rows, columns, channels = pixels.shape
        padded = torch.zeros(count, rows + 2 * vertical, columns + 2 * horizontal, channels + more, dtype=torch.int32)
        padded[:, vertical : vertical + rows, horizontal : horizontal + columns, :channels] = pixels
        return padded


# ---- the self-test -----------------------------------------------------------------------------------------------------


def _passes_self_test(by: InstructionSet) -> bool:
    """Whether an instruction set agrees with torch's int64 arithmetic on random and extreme values."""
    for weights, images, geometry in _cases():
        exact = functional.conv2d(images.to(torch.int64), weights.to(torch.int64), None, *geometry).to(torch.int32)
        found = CompiledConvolution(by, weights, *geometry)(images, (exact.shape[2], exact.shape[3]))
        if not torch.equal(found, exact):
            return False
    return True


def _cases() -> Iterator[tuple[torch.Tensor, torch.Tensor, tuple[Pair, Pair, Pair, int]]]:
    """Weights, images and (stride, padding, dilation, groups) that go through every kind of tile, panel and segment."""
    draw = torch.Generator().manual_seed(0)
    extremes = torch.tensor(
        [-(1 << 31), (1 << 31) - 1, -1, 0, 1, 0x7FFF8000, 0x00FF00FF, -(1 << 16)], dtype=torch.int32
    )

    def values(*shape: int) -> torch.Tensor:
        drawn = torch.randint(-(1 << 31), 1 << 31, shape, generator=draw).to(torch.int32)
        places = torch.randint(0, 3 * len(extremes), shape, generator=draw)
        return torch.where(places < len(extremes), extremes[places.clamp(max=len(extremes) - 1)], drawn)

    one = (1, 1)
    yield values(40, 350, 1, 1), values(1, 350, 1, 1), (one, (0, 0), one, 1)
    yield values(33, 20, 3, 3), values(2, 20, 9, 11), (one, one, one, 1)
    yield values(16, 4, 3, 2), values(1, 8, 12, 13), ((2, 1), (2, 0), (1, 2), 2)
    yield values(24, 1, 3, 3), values(1, 24, 10, 10), ((2, 2), one, one, 24)
