"""The public integer network that both parties of the engine `fast` compute, and the integer model whose owner hides weights.

THE CONTRACT between calibration (makes both), emulation (computes them in plaintext) and the protocol (runs them on shares).
A network is public; of an `IntegerModel` the weights are not, they stay at the model owner. The kinds of `layers` are in a
module of their own.

Values. A value is an integer tensor of `shape` (one record, without batch dimension) that stands for the real numbers
integer * scale. Its ring Z_2^bits is 32 bits wide ("wide") or narrower ("narrow"); elements are read as signed. Two
additive shares modulo 2^bits represent it: C's (hospital) and S's (model owner).

Truncation. A layer computes its result modulo 2^b, b the width of its inputs, and then, if `shift` > 0, truncates and
reduces: the value goes from width b to b - shift. With s_C, s_S the two shares modulo 2^b (S has added 2^shift - 1 to
its own), the shares of the result are the logical shifts s_C >> shift and s_S >> shift modulo 2^(b - shift). So
    result = (z + 2^shift - 1 - s_C mod 2^b) >> shift   +   s_C >> shift      modulo 2^(b - shift),
which is z / 2^shift rounded down or up, without bias because s_C is uniform: no message, no failure. The one thing
that an emulation needs besides the weights is therefore s_C of every layer with shift > 0 (both sessions can tell them,
keyed by the layer's output: `on_truncation`); without them it draws uniform ones.

What needs which width:
  Convolution, Linear        wide input, wide result before truncation; weights `weights[layer.output]`, held by S alone
  ReLU                       narrow input of 8 to 24 bits; output wide (extended for free) or as narrow as the input; with a
                             ceiling x >= ceiling - 2^(bits - 1), so that x - ceiling fits
  SignExtension              narrow input of 8 to 24 bits, |x| < 2^(bits - 2), wide output, same signed value
  MaxPool                    narrow in and out, |x| < 2^(bits - 2) so that differences fit; so too for logits whose label
                             alone is revealed
  AveragePool, Add           any width, equal for all inputs; Concatenate, Flatten too
So a narrow value cannot enter a linear layer: it goes through ReLU or SignExtension first. One truncation per layer: for a
residual block Add takes the convolution wide (shift 0) and the identity wide times a multiplier, and truncates the sum.

Lowering. AdaptiveAveragePool becomes AveragePool where all windows are equal. AveragePool is a plain sum: the divisor
goes into `scale`. Put MaxPool before ReLU and Concatenate before ReLU (both commute with it): fewer gates and rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import HeadroomError, ModelError
from mpc_fl.inference.fast import layers
from mpc_fl.inference.fast.layers import Convolution, Layer, Linear

RING_BITS = 32
NARROWEST, WIDEST_GATE = 8, 24  # widths of a comparison

Reveal = Literal["logits", "label"]  # what is opened to the hospital


@dataclass(frozen=True)
class Value:
    """A tensor of `shape` (C, H, W) or (F,), in Z_2^bits, that stands for integer * scale."""

    shape: tuple[int, ...]
    bits: int
    scale: float

    @property
    def elements(self) -> int:
        """Number of elements of one record."""
        return math.prod(self.shape)

    @property
    def wide(self) -> bool:
        """Whether it lives in Z_2^32, as the input of a linear layer must."""
        return self.bits == RING_BITS


@dataclass(frozen=True)
class Network:
    """A network as layers in order of execution. `values` describes the input, and the output of every layer.

    `input` is wide: C encodes a record as round(x / scale). `output` are the logits, of one dimension.
    """

    layers: tuple[Layer, ...]
    values: Mapping[str, Value]
    input: str
    output: str

    def __post_init__(self) -> None:
        known = {self.input}
        for layer in self.layers:
            _check(self, layer, known)
            known.add(layer.output)
        if self.output not in known or not self.values[self.input].wide:
            raise ModelError("the integer network has no output or a narrow input", "this is a defect of calibration")

    @property
    def linear_layers(self) -> tuple[Convolution | Linear, ...]:
        """The layers with weights, in order."""
        return tuple(layer for layer in self.layers if isinstance(layer, (Convolution, Linear)))


def _check(network: Network, layer: Layer, known: set[str]) -> None:
    values = network.values

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ModelError(f"layer '{layer.path}' of the integer network: {what}", "this is a defect of calibration")

    require(set(layer.inputs) <= known and len(layer.inputs) > 0, "an input does not exist yet")
    require(layer.output not in known and layer.output in values, "its output is not described or exists already")
    inputs, output = [values[name] for name in layer.inputs], values[layer.output]
    bits = inputs[0].bits
    require(all(value.bits == bits for value in inputs), "its inputs have different widths")
    require(0 <= layer.shift < bits and NARROWEST <= output.bits <= RING_BITS, "its shift or width is out of range")
    gate = NARROWEST <= bits <= WIDEST_GATE and layer.shift == 0
    if isinstance(layer, (Convolution, Linear)):
        require(bits == RING_BITS, "a linear layer needs a wide input")
        require(2 <= layer.weight_bits <= RING_BITS, "its weights have no possible width")
    if isinstance(layer, layers.ReLU):
        require(gate and output.bits in (bits, RING_BITS), "ReLU needs a narrow input and shift 0")
        require(layer.ceiling is None or 0 < layer.ceiling < 1 << (bits - 1), "its ceiling does not fit its input")
    elif isinstance(layer, layers.SignExtension):
        require(gate and output.bits == RING_BITS, "sign extension goes from narrow to wide")
    elif isinstance(layer, layers.MaxPool):
        require(gate and output.bits == bits, "a max-pool keeps a narrow width")
    else:
        require(output.bits == bits - layer.shift, "the output's width is not the input's less the shift")
    several = isinstance(layer, (layers.Add, layers.Concatenate))
    require(several or len(inputs) == 1, "it takes one input")
    require(not isinstance(layer, layers.Add) or len(layer.multipliers) == len(inputs), "one multiplier per input")
    try:
        shape = _output_shape(layer, inputs, output)
    except (ValueError, IndexError):  # a shape or option of another length
        shape = None
    require(shape == output.shape, "its output has another shape than it gives")


def _output_shape(layer: Layer, inputs: list[Value], output: Value) -> tuple[int, ...] | None:
    """The shape that a layer gives; None where it cannot be."""
    shape = inputs[0].shape
    if isinstance(layer, Linear):
        outputs, width = layer.weight_shape
        return (outputs,) if shape == (width,) else None
    if isinstance(layer, Convolution):
        outputs, width, *kernel = layer.weight_shape
        (vertical, horizontal), (channels, *size) = layer.padding, shape
        if layer.groups < 1 or channels != width * layer.groups or outputs % layer.groups:
            return None
        reach = [dilation * (length - 1) + 1 for dilation, length in zip(layer.dilation, kernel, strict=True)]
        return _windows(
            outputs, size, reach, layer.stride, (vertical, vertical, horizontal, horizontal), layer.dilation
        )
    if isinstance(layer, (layers.MaxPool, layers.AveragePool)):
        channels, *size = shape
        return _windows(channels, size, list(layer.kernel), layer.stride, layer.padding)
    if isinstance(layer, layers.Concatenate):
        same = all(value.shape[1:] == shape[1:] for value in inputs)
        return (sum(value.shape[0] for value in inputs), *shape[1:]) if same else None
    if isinstance(layer, layers.Flatten):
        return output.shape if output.elements == inputs[0].elements else None
    return shape if all(value.shape == shape for value in inputs) else None


def _windows(
    channels: int,
    size: list[int],
    reach: list[int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
) -> tuple[int, ...] | None:
    top, bottom, left, right = padding
    lengths = [channels]
    for length, window, step, pads in zip(size, reach, stride, (top + bottom, left + right), strict=True):
        if min(window, step, *dilation) < 1 or min(*padding, length + pads - window) < 0:
            return None
        lengths.append((length + pads - window) // step + 1)
    return tuple(lengths)


@dataclass(frozen=True, repr=False)
class IntegerWeights:
    """int32 weights (`weight_shape`) and biases (out,) of every linear layer, by the layer's output. Secret."""

    weights: Mapping[str, torch.Tensor]
    biases: Mapping[str, torch.Tensor]

    def require_fitting(self, network: Network) -> None:
        """Every layer of `network` has what it needs. Raises `ModelError`."""
        for layer in network.linear_layers:
            if tuple(self.biases[layer.output].shape) != (layer.weight_shape[0],):
                raise ModelError(f"layer '{layer.path}' has no bias of its size", "this is a defect of calibration")


@dataclass(frozen=True)
class IntegerModel:
    """What the model owner brings to a session: the public network, and its own integer weights. It refuses to be printed."""

    network: Network
    weights: Private[IntegerWeights]


def encode(network: Network, records: torch.Tensor) -> torch.Tensor:
    """Float records (N, ...) as elements of the network's input, int32: what an owner emulates.

    Raises `HeadroomError` for records of another shape, NaN, infinity and values that do not fit 32 bits.
    """
    scaled = _scaled(network, records)
    if not bool((scaled.abs() < 1 << (RING_BITS - 1)).all()):  # false for NaN
        raise HeadroomError("a record has values that are not finite or do not fit the ring", "check the image")
    return scaled.to(torch.int32)


def encode_silently(network: Network, records: torch.Tensor) -> torch.Tensor:
    """The same for what the hospital masks: no value of a record decides whether a session goes on.

    What does not fit becomes the nearest element that does, NaN zero: the model owner chose the scale, and an error would
    tell it about the record. Raises `HeadroomError` for records of another shape alone, which is public.
    """
    most = (1 << (RING_BITS - 1)) - 1
    return _scaled(network, records).nan_to_num_(nan=0.0).clamp_(-most, most).to(torch.int32)


def _scaled(network: Network, records: torch.Tensor) -> torch.Tensor:
    value = network.values[network.input]
    if tuple(records.shape[1:]) != value.shape:
        raise HeadroomError(f"records have shape {tuple(records.shape[1:])}, not {value.shape}", "resize them")
    return torch.round(records.double() / value.scale)


def channels_last(shape: tuple[int, ...], records: int) -> tuple[int, ...]:
    """(C, H, W) to (N, H, W, C), (F,) to (N, F)."""
    return (records, *shape[1:], shape[0]) if len(shape) == 3 else (records, *shape)


def label_bits(network: Network) -> tuple[int, int]:
    """Width of a logit and of a class index that are compared together, to open the label alone.

    Raises `ModelError` when they do not fit a comparison gate.
    """
    value = network.values[network.output]
    index = max(1, (value.elements - 1).bit_length())
    if value.bits + index > WIDEST_GATE:
        raise ModelError(
            f"logits of {value.bits} bits and {value.elements} classes do not fit a comparison of {WIDEST_GATE} bits",
            f"truncate the logits to {WIDEST_GATE - index} bits, or set inference.reveal to logits",
        )
    return value.bits, index
