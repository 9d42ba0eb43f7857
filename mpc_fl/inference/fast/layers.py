"""The kinds of layers that a public integer network has. What they compute, in which widths, is said in `network`.

Their class names enter the message that describes a network and the digest that pools are bound to (`messages.describe`):
renaming one would make pools and parties of other versions unusable. A new kind is added here with its place in `KINDS`,
to the checks of `network`, and where layers are lowered, emulated and evaluated on shares (modules that import `layers`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """One step: the values named `inputs` give the value named `output`, truncated by `shift` bits at the end.

    `path` is the layer's name as the user knows it, for messages.
    """

    path: str
    inputs: tuple[str, ...]
    output: str
    shift: int = 0


@dataclass(frozen=True)
class Convolution(Layer):
    """2-D cross-correlation as in torch, zero padding. `weight_shape` is (out, in / groups, height, width).

    The bias (out,) is an integer at the scale of the result before truncation. `weight_bits`: the signed integers
    weights[output] fit in so many bits (public; it decides how many limbs a convolution takes).
    """

    weight_shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    weight_bits: int = 16


@dataclass(frozen=True)
class Linear(Layer):
    """W x + bias, `weight_shape` (out, in), on a flat value (in,)."""

    weight_shape: tuple[int, int] = (0, 0)
    weight_bits: int = 16


@dataclass(frozen=True)
class ReLU(Layer):
    """max(x, 0), or with `ceiling` min(max(x, 0), ceiling), an integer at the scale of the input. shift is 0.

    `ceiling` is None where there is none: pools of earlier versions are bound to a description that says null then.
    """

    ceiling: int | None = None


@dataclass(frozen=True)
class SignExtension(Layer):
    """The same signed value, |x| < 2^(bits - 2), in Z_2^32. shift is 0."""


@dataclass(frozen=True)
class MaxPool(Layer):
    """Maximum over windows; `padding` (top, bottom, left, right) holds the smallest value -2^(bits - 2). shift is 0.

    An input without rows or columns to spare (ceil_mode) is padded at bottom and right.
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)


@dataclass(frozen=True)
class AveragePool(Layer):
    """`multiplier` times the sum (not the mean) over windows, zero padding (top, bottom, left, right)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    multiplier: int = 1


@dataclass(frozen=True)
class Add(Layer):
    """sum_i multipliers[i] * inputs[i] + constant, elementwise, all public integers; one input is allowed."""

    multipliers: tuple[int, ...] = (1, 1)
    constant: int = 0


@dataclass(frozen=True)
class Concatenate(Layer):
    """Inputs of one width and scale, concatenated along the channels (first dimension of `shape`)."""


@dataclass(frozen=True)
class Flatten(Layer):
    """(C, H, W) to (C * H * W,), or any reshape of one record to `values[output].shape` that keeps the order."""


KINDS: tuple[type[Layer], ...] = (
    Convolution,
    Linear,
    ReLU,
    SignExtension,
    MaxPool,
    AveragePool,
    Add,
    Concatenate,
    Flatten,
)
