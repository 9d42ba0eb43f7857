"""Convolutions and matrix products with weights that only the model owner knows, one convolution online.

W the weights (at S), y = y_C + y_S the activation (shared), all modulo 2^32; F = W - B and A, B as in `correlations`.

  once per model   S sends F = W - B. B is uniform and known to S and dealer, so F is uniform to C.
  offline          C:  z_C = F * A + u_C           S has u_S = A * B - u_C from the dealer
  online           C sends E = y_C - A             z_S = W * (E + y_S) + u_S + bias
z_C + z_S = W * (y - A) + (W - B) * A + A * B + bias = W * y + bias. C's share is ready before the image is known.

Security. E is uniform to S because A is C's alone (and the dealer's) and fresh for every image; several layers that read one
value share its E, which is one message. B may serve any number of images: all that C ever sees of it is F, and S's
corrections u_S are masked by u_C, fresh for every image and unknown to S. z_C is uniform to S for the same reason. S's
messages do not depend on the image but through uniform values.

Rounds and bytes: one message from C to S, 4 bytes per element of a value, for all layers that read it.

Truncation (`truncate`): shifting each share alone is off by the carry of the low parts alone, at most one unit, because the
wrap of the shares modulo 2^b vanishes modulo 2^(b - shift) (SecureML, section 4.1, has to fear it; here the ring shrinks).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mpc_fl.crypto.stream_cipher import Seed, Stream
from mpc_fl.inference.fast.kernels.integer_linear import PreparedConvolution, PreparedLinear
from mpc_fl.inference.fast.layers import Convolution, Linear
from mpc_fl.inference.fast.network import RING_BITS, Network


class LinearMap:
    """One layer's weights (int32, W, B or F) ready for many inputs, channels last: (N, H, W, I) to (N, H', W', O)."""

    def __init__(self, layer: Convolution | Linear, weights: torch.Tensor) -> None:
        self.weights = weights
        self._map: PreparedConvolution | PreparedLinear
        if isinstance(layer, Convolution):
            self._map = PreparedConvolution(weights, layer.stride, layer.padding, layer.dilation, layer.groups)
        else:
            self._map = PreparedLinear(weights)

    def __repr__(self) -> str:
        return repr(self._map)

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """The product modulo 2^32, contiguous."""
        if isinstance(self._map, PreparedLinear):
            return self._map(activations)
        return self._map(activations.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


def linear_maps(network: Network, weights: Mapping[str, torch.Tensor]) -> dict[str, LinearMap]:
    """Every layer's map, by the layer's output. Raises `ValueError` for weights of another shape or dtype."""
    maps = {}
    for layer in network.linear_layers:
        tensor = weights[layer.output]
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != layer.weight_shape:
            raise ValueError(f"the weights of layer '{layer.path}' are not int32 of shape {layer.weight_shape}")
        maps[layer.output] = LinearMap(layer, tensor)
    return maps


def weight_masks(network: Network, seed: Seed) -> dict[str, torch.Tensor]:
    """B of every layer, int32, from the seed that dealer and model owner have in common for this model."""
    masks = {}
    for layer in network.linear_layers:
        count = int(np.prod(layer.weight_shape))
        words = seed.stream("weights", layer.output).words(count, np.int32)
        masks[layer.output] = torch.from_numpy(words.reshape(layer.weight_shape))
    return masks


def product_share_of_hospital(masked_weights: LinearMap, mask: torch.Tensor, stream: Stream) -> torch.Tensor:
    """z_C = F * A + u_C, int32: C's share of the layer's result, before the image is known."""
    share = masked_weights(mask)
    stream.add_to(share)
    return share


def product_share_of_owner(
    weights: LinearMap, masked: torch.Tensor, correction: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """z_S = W * (E + y_S) + u_S + bias, int32: the one convolution online."""
    share = weights(masked)
    share += correction
    share += bias
    return share


def truncate(share: np.ndarray, bits: int, shift: int, first: bool) -> np.ndarray:
    """A share modulo 2^bits (uint32) of z, to a share modulo 2^(bits - shift) of z / 2^shift rounded at random.

    Local: S adds 2^shift - 1, so that rounding is up or down without bias, then both shift.
    """
    if shift == 0:
        return share
    if not first:
        share = share + np.uint32((1 << shift) - 1)
    if bits < RING_BITS:
        share = share & np.uint32((1 << bits) - 1)
    return share >> np.uint32(shift)
