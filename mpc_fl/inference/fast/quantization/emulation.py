"""The shared arithmetic of the engine `fast`, bit for bit, in plaintext: what a protocol run must give.

A model owner can tell with it how exact its integer model is, before any hospital asks; tests compare protocol runs with it.

Everything but truncation is a function of the value alone. A truncation rounds up or down as the hospital's share says
(`network`), so those shares are an argument: the ones that a protocol run recorded, or uniform ones from a seed, as they
are in a protocol run. Values must be in range (`calibration.self_check`): maxima of others differ from the protocol's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional

from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.inference.fast import layers
from mpc_fl.inference.fast.kernels.integer_linear import PreparedConvolution, PreparedLinear
from mpc_fl.inference.fast.network import IntegerWeights, Network, encode


def signed(elements: torch.Tensor, bits: int) -> torch.Tensor:
    """Elements of Z_2^bits in any int64 representation, read as signed, int64."""
    return (elements << (64 - bits)) >> (64 - bits)


def truncate(value: torch.Tensor, bits: int, shift: int, hospital_share: torch.Tensor) -> torch.Tensor:
    """int64 `value` modulo 2^bits over 2^shift, rounded as the hospital's share of it says: signed, modulo 2^(bits - shift)."""
    mask = (1 << bits) - 1
    hospital = hospital_share.to(torch.int64) & mask
    owner = (value + (1 << shift) - 1 - hospital) & mask
    return signed((owner >> shift) + (hospital >> shift), bits - shift)


class Emulator:
    """A network with its weights, for plaintext records. Weights are secret: only their owner can emulate."""

    def __init__(self, network: Network, weights: IntegerWeights) -> None:
        self.network, self.biases = network, weights.biases
        self._maps: dict[str, PreparedConvolution | PreparedLinear] = {}
        for layer in network.linear_layers:
            tensor = weights.weights[layer.output]
            if isinstance(layer, layers.Convolution):
                geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
                self._maps[layer.output] = PreparedConvolution(tensor, *geometry)
            else:
                self._maps[layer.output] = PreparedLinear(tensor)

    def __repr__(self) -> str:
        return f"Emulator({len(self.network.layers)} layers)"

    def run(
        self, elements: torch.Tensor, hospital_shares: Mapping[str, torch.Tensor] | Seed, keep: bool = False
    ) -> dict[str, torch.Tensor]:
        """Values by name, int64 (N, *shape), read as signed; the network's output alone unless `keep`.

        `elements` are what `encode` returns. `hospital_shares` holds, for every layer with shift > 0 by its output, the
        hospital's share of the result before truncation, integers (N, *shape) of any representation modulo 2^bits; or it is
        a seed, from which uniform shares are drawn (and which cannot draw them twice).
        """
        network = self.network
        last = {name: index for index, layer in enumerate(network.layers) for name in layer.inputs}
        values = {network.input: elements.to(torch.int64)}
        for index, layer in enumerate(network.layers):
            inputs = [values[name] for name in layer.inputs]
            bits, target = network.values[layer.inputs[0]].bits, network.values[layer.output]
            result = signed(self._result(layer, inputs, bits), bits if layer.shift else target.bits)
            result = result.reshape(len(elements), *target.shape)
            if layer.shift:
                if isinstance(hospital_shares, Seed):
                    stream = hospital_shares.stream("emulation", layer.output)
                    share = stream.ring_elements(tuple(result.shape), bits)
                else:
                    share = hospital_shares[layer.output]
                result = truncate(result, bits, layer.shift, share)
            values[layer.output] = result
            if not keep:
                for name in layer.inputs:
                    if last[name] == index and name != network.output:
                        values.pop(name, None)
        return values if keep else {network.output: values[network.output]}

    def logits(self, records: torch.Tensor, hospital_shares: Mapping[str, torch.Tensor] | Seed) -> torch.Tensor:
        """Decoded logits, float64 (N, classes), of float records."""
        output = self.network.output
        result = self.run(encode(self.network, records), hospital_shares)[output]
        return result.double() * self.network.values[output].scale

    def _result(self, layer: layers.Layer, inputs: list[torch.Tensor], bits: int) -> torch.Tensor:
        """What a layer computes before truncation, int64, not yet reduced."""
        first = inputs[0]
        if isinstance(layer, (layers.Convolution, layers.Linear)):
            bias = self.biases[layer.output].to(torch.int64)
            result = self._maps[layer.output](first.to(torch.int32)).to(torch.int64)
            return result + (bias[:, None, None] if isinstance(layer, layers.Convolution) else bias)
        if isinstance(layer, layers.ReLU):
            return first.clamp(0, layer.ceiling)
        if isinstance(layer, (layers.SignExtension, layers.Flatten)):
            return first
        if isinstance(layer, layers.Concatenate):
            return torch.cat(inputs, dim=1)
        if isinstance(layer, layers.Add):
            return sum((m * x for m, x in zip(layer.multipliers, inputs, strict=True)), torch.tensor(layer.constant))
        if isinstance(layer, layers.MaxPool):
            padded = _padded(first, layer.padding, -(1 << (bits - 2)))
            return functional.max_pool2d(padded, layer.kernel, layer.stride).to(torch.int64)
        if isinstance(layer, layers.AveragePool):
            padded = _padded(first, layer.padding, 0)
            # Sums of 32-bit integers over fewer than 2^21 pixels are exact in float64.
            total = functional.avg_pool2d(padded, layer.kernel, layer.stride, divisor_override=1)
            return layer.multiplier * total.to(torch.int64)
        raise TypeError(f"no emulation of {type(layer).__name__}")


def _padded(values: torch.Tensor, padding: tuple[int, int, int, int], fill: int) -> torch.Tensor:
    top, bottom, left, right = padding
    return functional.pad(values.double(), (left, right, top, bottom), value=float(fill))
