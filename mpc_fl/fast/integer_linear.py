"""Exact convolutions and matrix products modulo 2^32.

Elements of Z_2^32 are int32. Processors multiply bytes far faster than words (AVX-512 VNNI, AMX), so both factors are
written in signed digits ("limbs"), x = x_0 + 2^8 x_1 + 2^16 x_2 + 2^24 x_3 with -128 <= x_i < 128, and
    W x = sum over i + j <= 3 of 2^(8 (i + j)) W_i x_j   modulo 2^32,
because higher pairs vanish. All pairs of one i + j are one product of 8-bit matrices, with the limbs side by side along
the summed dimension: [x_j x_(j+1)] [W_(j+1); W_j]. 32-bit sums may wrap there: that is the modulus. Weights of 16 bits
have two limbs, so 7 of 16 pairs remain.

Four methods give the same result, and the fastest is chosen by measurement, once per shape: `bytes` as above, `halves`
(16-bit limbs, sums below 2^53 exact in float64), `integers` (torch's int64 arithmetic), `taps` (depthwise
convolutions: one multiply-add per weight). Before the first use the first two are compared with int64 arithmetic on
random and extreme values; one that fails (kernels that saturate exist) is never used in this process. Prepared weights
take 1 byte per limb (halves: 8 bytes).
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

log = logging.getLogger(__name__)
Method = Literal["bytes", "halves", "integers", "taps"]
Pair = tuple[int, int]

_PATCH_BYTES = 1 << 20  # patches are unfolded in pieces that stay inside the second-level cache
_MANY_WEIGHTS = 1 << 22
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))


@dataclass(frozen=True)
class _Limbs:
    """A way to write elements of Z_2^32: `count` signed digits of `bits` bits each, held in `dtype` for `multiply`."""

    bits: int
    count: int
    digit: torch.dtype
    dtype: torch.dtype
    multiply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]

    def shifted(self, elements: torch.Tensor) -> torch.Tensor:
        """An int32 tensor whose bits, digit by digit, are the signed limbs: ((x + h) xor h) with h = half a digit each."""
        half = sum(1 << (self.bits * (index + 1) - 1) for index in range(self.count))
        constant = torch.tensor(half - (1 << 32), dtype=torch.int32)
        return (elements + constant).bitwise_xor_(constant)

    def limb(self, shifted: torch.Tensor, index: int) -> torch.Tensor:
        """Limb number `index` of what `shifted` returned."""
        return (shifted >> (self.bits * index)).to(self.digit)


def _multiply_bytes(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    if left.shape[1] == 1:  # torch 2.13 misreads a right factor of one row with strides (1, 1)
        torch.mul(left.to(torch.int32), right.to(torch.int32), out=out)
    else:
        torch._int_mm(left, right, out=out)


def _multiply_halves(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    # Products of two limbs are at most 2^30, and two limbs stand side by side.
    if left.shape[1] > 1 << 22:
        raise ValueError("sums of more than 2^22 products of 16-bit limbs may not be exact")
    out.copy_((left @ right).to(torch.int64))


_LIMBS = {
    "bytes": _Limbs(8, 4, torch.int8, torch.int8, _multiply_bytes),
    "halves": _Limbs(16, 2, torch.int16, torch.float64, _multiply_halves),
}


def _check_elements(tensor: torch.Tensor, dimensions: tuple[int, ...], what: str) -> None:
    if tensor.dtype != torch.int32 or tensor.dim() not in dimensions:
        raise ValueError(f"{what} must be int32 with {dimensions} dimensions, not {tensor.dtype} {tuple(tensor.shape)}")


def _bytes_needed(elements: torch.Tensor) -> int:
    """How many signed bytes, 1 to 4, hold every element."""
    low, high = (int(bound) for bound in torch.aminmax(elements)) if elements.numel() else (0, 0)
    ones = (1, 0x101, 0x10101)
    return next((count for count, one in enumerate(ones, 1) if -128 * one <= low and high <= 127 * one), 4)


class _PreparedMatrix:
    """The transposed right factor of `elements @ matrix^T`, (N, K): its limbs side by side, the higher ones first."""

    def __init__(self, matrix: torch.Tensor, kind: _Limbs) -> None:
        self.kind = kind
        self.columns, self.inner = matrix.shape
        shifted = kind.shifted(matrix)
        limbs = [kind.limb(shifted, index) for index in range(kind.count)]
        while len(limbs) > 1 and not bool(limbs[-1].any()):
            limbs.pop()
        self.limbs = len(limbs)
        self.stacked = torch.cat(limbs[::-1], dim=1).to(kind.dtype)

    def multiply_into(self, out: torch.Tensor, rows: torch.Tensor, scratch: torch.Tensor) -> None:
        """out = rows @ matrix^T; `rows` (M, count * K) hold the limbs side by side, `out` and `scratch` are int32 (M, N)."""
        for total in range(self.kind.count):  # i + j
            lowest = max(0, total - self.limbs + 1)
            left = rows[:, lowest * self.inner : (total + 1) * self.inner]
            first = (self.limbs - 1 - (total - lowest)) * self.inner
            right = self.stacked[:, first:].t()
            if total == 0:
                self.kind.multiply(left, right, out)
            else:
                self.kind.multiply(left, right, scratch)
                out.add_(scratch, alpha=1 << (self.kind.bits * total))


def _limbs_side_by_side(elements: torch.Tensor, kind: _Limbs) -> torch.Tensor:
    """int32 (M, K) to limbs (M, count * K)."""
    shifted = kind.shifted(elements)
    rows = torch.empty(len(elements), kind.count, elements.shape[1], dtype=kind.dtype)
    for index in range(kind.count):
        rows[:, index] = kind.limb(shifted, index)
    return rows.view(len(elements), -1)


class PreparedConvolution:
    """A convolution with fixed weights, int32 (O, I / groups, kernel height, width), ready for many inputs.

    Calling it with int32 (N, I, H, W) gives int32 (N, O, H', W') modulo 2^32, as `torch.nn.functional.conv2d` would with
    unbounded integers. Results are channels-last in memory, and such inputs are fastest. `method` pins how; by default the
    fastest on this machine is found at the first call with a shape. Weights may be secret: printing shows shapes alone.
    Raises `ValueError` for other types and shapes.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        groups: int = 1,
        method: Method | None = None,
    ) -> None:
        _check_elements(weights, (4,), "weights")
        if groups < 1 or len(weights) % groups:
            raise ValueError(f"{len(weights)} output channels cannot be divided into {groups} groups")
        self.weights, self.stride, self.padding, self.dilation, self.groups = weights, stride, padding, dilation, groups
        self.kernel: Pair = (weights.shape[2], weights.shape[3])
        self.in_channels = weights.shape[1] * groups
        self._method = method
        self._matrices: dict[str, list[_PreparedMatrix]] = {}
        self._taps: torch.Tensor | None = None
        self._bytes = _bytes_needed(weights)

    def __repr__(self) -> str:
        return f"PreparedConvolution{tuple(self.weights.shape)}"

    @property
    def depthwise(self) -> bool:
        """Whether every output channel reads one input channel."""
        return self.weights.shape[1] == 1 and self.groups > 1

    def output_size(self, rows: int, columns: int) -> Pair:
        """Height and width of the result for an input of this height and width."""
        sizes = []
        for size, kernel, stride, padding, dilation in zip(
            (rows, columns), self.kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            sizes.append((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
        return sizes[0], sizes[1]

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """The convolution of int32 (N, I, H, W), exact modulo 2^32."""
        _check_elements(activations, (4,), "activations")
        if activations.shape[1] != self.in_channels or min(self.output_size(*activations.shape[2:])) < 1:
            raise ValueError(f"{self!r} cannot take activations of shape {tuple(activations.shape)}")
        return self._run(self._method or self._fastest(activations), activations)

    def _run(self, method: Method, activations: torch.Tensor) -> torch.Tensor:
        if method == "integers":
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            weights, inputs = self.weights.to(torch.int64), activations.to(torch.int64)
            result = functional.conv2d(inputs, weights, None, *geometry).to(torch.int32)
            return result.contiguous(memory_format=torch.channels_last)
        if method == "taps":
            return self._by_taps(activations)
        return self._by_limbs(activations, method)

    def _fastest(self, activations: torch.Tensor) -> Method:
        # Few limbs are faster, so two layers of one shape may differ; how many bytes weights have is public.
        limbs = self._bytes
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        key = ("convolution", tuple(self.weights.shape), tuple(activations.shape), geometry, limbs)
        candidates: tuple[Method, ...] = ("taps", "integers") if self.depthwise else _candidates(self.weights)
        chosen = _fastest(key, candidates, lambda method: self._run(method, activations))
        self._matrices = {method: matrices for method, matrices in self._matrices.items() if method == chosen}
        return chosen

    def _prepared(self, method: str) -> list[_PreparedMatrix]:
        """One matrix per group, (O / groups, kernel height * width * I / groups), inputs' channels last."""
        if method not in self._matrices:
            parts = self.weights.permute(0, 2, 3, 1).flatten(1).chunk(self.groups)
            self._matrices[method] = [_PreparedMatrix(part, _LIMBS[method]) for part in parts]
        return self._matrices[method]

    def _by_limbs(self, activations: torch.Tensor, method: str) -> torch.Tensor:
        matrices = self._prepared(method)
        rows, columns = self.output_size(*activations.shape[2:])
        count, width = len(activations), activations.shape[1] // self.groups
        result = torch.empty(count, rows, columns, len(self.weights), dtype=torch.int32)
        pixels = activations.permute(0, 2, 3, 1)
        for group, matrix in enumerate(matrices):
            part = pixels[..., group * width : (group + 1) * width]
            if self.groups == 1:
                self._multiply_patches(part, matrix, result)
            else:
                inside = torch.empty(count, rows, columns, matrix.columns, dtype=torch.int32)
                self._multiply_patches(part, matrix, inside)
                result[..., group * matrix.columns : (group + 1) * matrix.columns] = inside
        return result.permute(0, 3, 1, 2)

    def _multiply_patches(self, pixels: torch.Tensor, matrix: _PreparedMatrix, result: torch.Tensor) -> None:
        """result (N, H', W', O), contiguous, from pixels (N, H, W, I)."""
        kind, (_, rows, columns, outputs) = matrix.kind, result.shape
        if self.kernel == (1, 1) and self.padding == (0, 0):
            inputs = pixels[:, :: self.stride[0], :: self.stride[1]].reshape(-1, pixels.shape[-1])
            patches = _limbs_side_by_side(inputs, kind)
            flat = result.view(-1, outputs)
            matrix.multiply_into(flat, patches, torch.empty_like(flat))
            return
        planes = self._padded_planes(pixels, kind)
        bytes_per_row = columns * kind.count * matrix.inner * planes.element_size()
        step = max(1, _PATCH_BYTES // bytes_per_row)
        images = max(1, step // rows)
        scratch = torch.empty(images * min(step, rows) * columns, outputs, dtype=torch.int32)
        height = rows if images > 1 else step  # a piece is some whole images, or some rows of one
        for first in range(0, len(result), images):
            for top in range(0, rows, height):
                out = result[first : first + images, top : top + height]
                patches = self._unfolded(planes[:, first : first + images], top, out.shape[1], columns)
                flat = out.view(-1, outputs)
                matrix.multiply_into(flat, patches, scratch[: len(flat)])

    def _padded_planes(self, pixels: torch.Tensor, kind: _Limbs) -> torch.Tensor:
        """Limbs of (N, H, W, I) as planes (count, N, H + padding, W + padding, I); zeros have zero limbs."""
        (vertical, horizontal), (count, rows, columns, channels) = self.padding, pixels.shape
        padded = (kind.count, count, rows + 2 * vertical, columns + 2 * horizontal, channels)
        planes = torch.zeros(padded, dtype=kind.dtype)
        shifted = kind.shifted(pixels.contiguous())
        for index in range(kind.count):
            inside = planes[index, :, vertical : vertical + rows, horizontal : horizontal + columns]
            inside.copy_(kind.limb(shifted, index))
        return planes

    def _unfolded(self, planes: torch.Tensor, top: int, rows: int, columns: int) -> torch.Tensor:
        """Patches of output rows top .. top + rows - 1, (N * rows * columns, count * kernel height * width * I)."""
        size, dtype = planes.shape[-1] * planes.element_size(), planes.dtype
        for width, word in _WORDS:  # copy words, not bytes
            if size % width == 0:
                planes = planes.view(word)
                break
        limb, image, row, column, _ = planes.stride()
        shape = (planes.shape[1], rows, columns, planes.shape[0], *self.kernel, planes.shape[-1])
        steps = (image, row * self.stride[0], column * self.stride[1], limb)
        strides = (*steps, row * self.dilation[0], column * self.dilation[1], 1)
        start = planes.storage_offset() + top * self.stride[0] * row
        patches = planes.as_strided(shape, strides, start).contiguous()
        return patches.view(shape[0] * rows * columns, -1).view(dtype)

    def _by_taps(self, activations: torch.Tensor) -> torch.Tensor:
        """Depthwise: for each place in the kernel, a multiply-add of whole int32 images; they wrap modulo 2^32."""
        if self._taps is None:
            self._taps = self.weights[:, 0].permute(1, 2, 0).contiguous()  # (kernel height, width, O)
        (vertical, horizontal), (rows, columns) = self.padding, self.output_size(*activations.shape[2:])
        pixels = activations.permute(0, 2, 3, 1)
        pixels = functional.pad(pixels, (0, 0, horizontal, horizontal, vertical, vertical))
        multiplicity = len(self.weights) // self.groups
        if multiplicity > 1:
            pixels = pixels.repeat_interleave(multiplicity, dim=3)
        pixels = pixels.contiguous()
        result = torch.zeros(len(activations), rows, columns, len(self.weights), dtype=torch.int32)
        for y in range(self.kernel[0]):
            for x in range(self.kernel[1]):
                top, left = y * self.dilation[0], x * self.dilation[1]
                seen = pixels[:, top :: self.stride[0], left :: self.stride[1]][:, :rows, :columns]
                result.addcmul_(seen, self._taps[y, x])
        return result.permute(0, 3, 1, 2)


class PreparedLinear:
    """A matrix product with fixed weights, int32 (out, in): called with int32 (N, in) it gives int32 (N, out) mod 2^32."""

    def __init__(self, weights: torch.Tensor, method: Method | None = None) -> None:
        _check_elements(weights, (2,), "weights")
        self.weights = weights
        self._method = method
        self._matrices: dict[str, _PreparedMatrix] = {}

    def __repr__(self) -> str:
        return f"PreparedLinear{tuple(self.weights.shape)}"

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """activations @ weights^T, exact modulo 2^32."""
        _check_elements(activations, (2,), "activations")
        if activations.shape[1] != self.weights.shape[1]:
            raise ValueError(f"{self!r} cannot take activations of shape {tuple(activations.shape)}")
        return self._run(self._method or self._fastest(activations), activations)

    def _fastest(self, activations: torch.Tensor) -> Method:
        key = ("linear", tuple(self.weights.shape), tuple(activations.shape))
        return _fastest(key, _candidates(self.weights), lambda method: self._run(method, activations))

    def _run(self, method: Method, activations: torch.Tensor) -> torch.Tensor:
        if method == "integers":
            return functional.linear(activations.to(torch.int64), self.weights.to(torch.int64)).to(torch.int32)
        kind = _LIMBS[method]
        if method not in self._matrices:
            self._matrices[method] = _PreparedMatrix(self.weights, kind)
        result = torch.empty(len(activations), len(self.weights), dtype=torch.int32)
        self._matrices[method].multiply_into(result, _limbs_side_by_side(activations, kind), torch.empty_like(result))
        return result


def convolve(
    weights: torch.Tensor,
    activations: torch.Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """One convolution modulo 2^32; see `PreparedConvolution`, which spares preparing the weights every time."""
    return PreparedConvolution(weights, stride, padding, dilation, groups)(activations)


def linear(weights: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
    """activations (N, in) @ weights (out, in)^T modulo 2^32; see `PreparedLinear`."""
    return PreparedLinear(weights)(activations)


_chosen: dict[object, Method] = {}


def _candidates(weights: torch.Tensor) -> tuple[Method, ...]:
    """The methods worth measuring: bytes always beat halves, and wide copies of many weights take too much memory."""
    limbs = usable()[:1]
    return limbs if limbs and weights.numel() > _MANY_WEIGHTS else (*limbs, "integers")


def _fastest(key: object, candidates: tuple[Method, ...], run: Callable[[Method], torch.Tensor]) -> Method:
    """The fastest candidate for this shape: each runs once to warm up and once measured, unless it was hopeless.

    The last candidate, exact integers if there are several, also checks the others' results.
    """
    key = (key, torch.get_num_threads())
    if key not in _chosen:
        best: tuple[float, Method] | None = None
        exact = run(candidates[-1]) if len(candidates) > 1 else None
        for method in candidates:
            seconds = _seconds(run, method)
            if exact is not None and not torch.equal(run(method), exact):
                log.warning("integer convolution by %s is wrong for %s, a slower way is used", method, key)
                continue
            if best is None or seconds < 4 * best[0]:
                seconds = min(seconds, _seconds(run, method))
            if best is None or seconds < best[0]:
                best = (seconds, method)
        assert best is not None
        _chosen[key] = best[1]
    return _chosen[key]


def chosen_methods() -> tuple[Method, ...]:
    """The method of every shape seen so far, for reports."""
    return tuple(_chosen.values())


def _seconds(run: Callable[[Method], object], method: Method) -> float:
    start = time.perf_counter()
    run(method)
    return time.perf_counter() - start


@functools.cache
def usable() -> tuple[Method, ...]:
    """The methods with limbs that pass the self-test in this process; runs it once, within some 20 ms."""
    methods: list[Method] = ["bytes", "halves"]
    return tuple(method for method in methods if passes_self_test(method))


def passes_self_test(method: Method) -> bool:
    """Whether a method agrees with torch's int64 arithmetic on random and extreme values. Logs a warning if not."""
    draw = torch.Generator().manual_seed(0)
    extremes = torch.tensor(
        [-(1 << 31), (1 << 31) - 1, -1, 0x7F7F7F7F, 0x80808080 - (1 << 32), 0x7FFF8000, 0x80 << 8, 0, 1, 0x00FF00FF],
        dtype=torch.int32,
    )

    def values(*shape: int, only: int | None = None) -> torch.Tensor:
        drawn = torch.randint(-(1 << 31), 1 << 31, shape, generator=draw).to(torch.int32)
        places = torch.randint(0, 3 * len(extremes), shape, generator=draw) if only is None else torch.full(shape, only)
        return torch.where(places < len(extremes), extremes[places.clamp(max=len(extremes) - 1)], drawn)

    try:
        for rows, inner, columns in ((1, 512, 3), (49, 1155, 40), (200, 64, 64)):
            for left, right in ((values(rows, inner), values(columns, inner)), *_constant_pairs(values, rows, inner)):
                exact = (left.to(torch.int64) @ right.to(torch.int64).t()).to(torch.int32)
                if not torch.equal(PreparedLinear(right, method)(left), exact):
                    raise ArithmeticError(f"a product of {rows} x {inner} x {columns} is wrong")
        weights, images = values(24, 16, 3, 3), values(2, 16, 9, 11)
        exact = functional.conv2d(images.to(torch.int64), weights.to(torch.int64), None, (2, 1), (1, 1)).to(torch.int32)
        if not torch.equal(PreparedConvolution(weights, (2, 1), (1, 1), method=method)(images), exact):
            raise ArithmeticError("a convolution is wrong")
    except (ArithmeticError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("integer convolution by %s is not usable on this machine, a slower way is: %s", method, reason)
        return False
    return True


def _constant_pairs(
    values: Callable[..., torch.Tensor], rows: int, inner: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Matrices of one extreme value each: all limbs -128, or all 127 and -128, where a saturating kernel fails."""
    most_negative, most_positive = 4, 3
    return (
        (values(rows, inner, only=most_negative), values(8, inner, only=most_negative)),
        (values(rows, inner, only=most_positive), values(8, inner, only=most_negative)),
    )
