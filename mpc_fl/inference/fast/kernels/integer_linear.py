"""Exact convolutions and matrix products modulo 2^32, on int32 tensors.

Five methods give the same result: `compiled` (a library of our own, where one was built), `bytes` and `halves` (`limbs`,
after unfolding patches), `integers` (torch's int64 arithmetic), and `taps` (depthwise convolutions: one multiply-add of whole
images per weight). The fastest is chosen by measurement, once per shape, and the ends of its result are compared with those
of `integers` then: the whole would take minutes for large layers. Prepared weights take 4 bytes, or 1 per limb (halves: 8).
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional

from mpc_fl.inference.fast.kernels import limbs
from mpc_fl.inference.fast.kernels.compiled import CompiledConvolution, InstructionSet, kernels
from mpc_fl.inference.fast.kernels.limbs import LIMBS, Limbs, PreparedMatrix, bytes_needed, limbs_side_by_side, usable

log = logging.getLogger(__name__)
Method = Literal["compiled", "bytes", "halves", "integers", "taps"]
Pair = tuple[int, int]

_PATCH_BYTES = 1 << 20  # patches are unfolded in pieces that stay inside the second-level cache
_MANY_PRODUCTS = 1 << 24  # torch's int64 arithmetic, some 10^8 products a second, is never the fastest beyond
_HOPELESS = 4  # a method that took so many times as long as another in a trial is not measured for each shape
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))


def _check_elements(tensor: torch.Tensor, dimensions: tuple[int, ...], what: str) -> None:
    if tensor.dtype != torch.int32 or tensor.dim() not in dimensions:
        raise ValueError(f"{what} must be int32 with {dimensions} dimensions, not {tensor.dtype} {tuple(tensor.shape)}")


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
        self._matrices: dict[str, list[PreparedMatrix]] = {}
        self._taps: torch.Tensor | None = None
        self._compiled: CompiledConvolution | None = None
        self._bytes = bytes_needed(weights)

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
        if method == "compiled":
            if self._compiled is None:
                geometry = (self.stride, self.padding, self.dilation, self.groups)
                self._compiled = CompiledConvolution(_instruction_set(), self.weights, *geometry)
            return self._compiled(activations, self.output_size(*activations.shape[2:]))
        return self._by_limbs(activations, method)

    def _fastest(self, activations: torch.Tensor) -> Method:
        # Few limbs are faster, so two layers of one shape may differ; how many bytes weights have is public.
        limbs = self._bytes
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        key = ("convolution", tuple(self.weights.shape), tuple(activations.shape), geometry, limbs)
        products = len(activations) * math.prod(self.output_size(*activations.shape[2:])) * self.weights.numel()
        candidates = _candidates("taps" if self.depthwise else None, products)
        chosen = _fastest(
            key, candidates, lambda method: self._run(method, activations), lambda: self._exact_ends(activations)
        )
        self._matrices = {method: matrices for method, matrices in self._matrices.items() if method == chosen}
        self._compiled = self._compiled if chosen == "compiled" else None
        return chosen

    def _exact_ends(self, activations: torch.Tensor) -> torch.Tensor:
        """The first and the last output channel of the first image, int32 (1, 2, H', W'), by torch's int64 arithmetic."""
        image, width, geometry = (
            activations[:1].to(torch.int64),
            self.weights.shape[1],
            (self.stride, self.padding, self.dilation),
        )
        ends = ((image[:, :width], self.weights[:1]), (image[:, -width:], self.weights[-1:]))
        results = [functional.conv2d(part, one.to(torch.int64), None, *geometry) for part, one in ends]
        return torch.cat(results, dim=1).to(torch.int32)

    def _prepared(self, method: str) -> list[PreparedMatrix]:
        """One matrix per group, (O / groups, kernel height * width * I / groups), inputs' channels last."""
        if method not in self._matrices:
            parts = self.weights.permute(0, 2, 3, 1).flatten(1).chunk(self.groups)
            self._matrices[method] = [PreparedMatrix(part, LIMBS[method]) for part in parts]
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

    def _multiply_patches(self, pixels: torch.Tensor, matrix: PreparedMatrix, result: torch.Tensor) -> None:
        """result (N, H', W', O), contiguous, from pixels (N, H, W, I)."""
        kind, (_, rows, columns, outputs) = matrix.kind, result.shape
        if self.kernel == (1, 1) and self.padding == (0, 0):
            inputs = pixels[:, :: self.stride[0], :: self.stride[1]].reshape(-1, pixels.shape[-1])
            patches = limbs_side_by_side(inputs, kind)
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

    def _padded_planes(self, pixels: torch.Tensor, kind: Limbs) -> torch.Tensor:
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
        self._matrices: dict[str, PreparedMatrix] = {}
        self._compiled: CompiledConvolution | None = None

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
        candidates = _candidates(None, len(activations) * self.weights.numel())
        chosen = _fastest(
            key, candidates, lambda method: self._run(method, activations), lambda: self._exact_ends(activations)
        )
        self._matrices = {method: matrix for method, matrix in self._matrices.items() if method == chosen}
        self._compiled = self._compiled if chosen == "compiled" else None
        return chosen

    def _exact_ends(self, activations: torch.Tensor) -> torch.Tensor:
        """The first and the last output for the first row, int32 (1, 2), by torch's int64 arithmetic."""
        ends = self.weights[[0, -1]].to(torch.int64)
        return functional.linear(activations[:1].to(torch.int64), ends).to(torch.int32)

    def _run(self, method: Method, activations: torch.Tensor) -> torch.Tensor:
        if method == "integers":
            return functional.linear(activations.to(torch.int64), self.weights.to(torch.int64)).to(torch.int32)
        if method == "compiled":
            if self._compiled is None:  # every row is an image of one pixel
                pixel = self.weights[:, :, None, None]
                self._compiled = CompiledConvolution(_instruction_set(), pixel, (1, 1), (0, 0), (1, 1), 1)
            return self._compiled(activations[:, :, None, None], (1, 1))[:, :, 0, 0]
        kind = LIMBS[method]
        if method not in self._matrices:
            self._matrices[method] = PreparedMatrix(self.weights, kind)
        result = torch.empty(len(activations), len(self.weights), dtype=torch.int32)
        self._matrices[method].multiply_into(result, limbs_side_by_side(activations, kind), torch.empty_like(result))
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


def _instruction_set() -> InstructionSet:
    found = kernels()
    if found.used is None:
        raise ValueError(f"no compiled kernels here: {found.why_not}")
    return found.used


@functools.cache
def _fast_methods() -> tuple[Method, ...]:
    """The compiled kernels where there are some, and the fastest limbs unless a trial shows them to be hopeless."""
    best = usable()[:1]
    if kernels().used is None:
        return best
    rows, matrix = limbs.trial_factors()
    product = PreparedLinear(matrix, "compiled")
    taken = min(_seconds(lambda _: product(rows), "compiled") for _ in range(3))
    return ("compiled", *(method for method in best if limbs.trial_seconds(method) < _HOPELESS * taken))


def _candidates(special: Method | None, products: int) -> tuple[Method, ...]:
    """The methods worth measuring: compiled kernels; the one for a special kind of layer, or the fastest limbs; integers."""
    fast = _fast_methods() if special is None else (special,)
    if special is not None and kernels().used is not None:
        fast = ("compiled", special)
    return fast if fast and products > _MANY_PRODUCTS else (*fast, "integers")


def _fastest(
    key: object,
    candidates: tuple[Method, ...],
    run: Callable[[Method], torch.Tensor],
    exact_ends: Callable[[], torch.Tensor],
) -> Method:
    """The fastest candidate for this shape: each runs once to warm up and once measured, unless it was hopeless.

    `exact_ends` gives (1, 2, ...), what the first and the last output are for the first record; a candidate with another
    result is not used, and integers where none is left. It takes as long as some of the methods, so it is asked once.
    """
    key = (key, torch.get_num_threads())
    if key not in _chosen:
        best: tuple[float, Method] | None = None
        exact = exact_ends()
        for method in candidates:
            seconds = _seconds(run, method)
            if method != "integers" and not torch.equal(run(method)[:1, [0, -1]], exact):
                log.warning("integer convolution by %s is wrong for %s, a slower way is used", method, key)
                continue
            if best is None or seconds < 4 * best[0]:
                seconds = min(seconds, _seconds(run, method))
            if best is None or seconds < best[0]:
                best = (seconds, method)
        _chosen[key] = "integers" if best is None else best[1]
    return _chosen[key]


def chosen_methods() -> tuple[Method, ...]:
    """The method of every shape seen so far, for reports."""
    return tuple(_chosen.values())


def _seconds(run: Callable[[Method], object], method: Method) -> float:
    start = time.perf_counter()
    run(method)
    return time.perf_counter() - start
