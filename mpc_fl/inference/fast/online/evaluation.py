"""One evaluation of an integer network on shares, at the hospital (C) or the model owner (S): here the image is masked.

Both parties walk the same public list of layers; a value is two shares, numpy uint32, channels last (N, H, W, C). C begins with
the encoded records, S with zeros.

  Convolution, Linear   C sends E once per value that they read, S convolves (`linear`): 1 message
  ReLU                  one comparison gate on all elements (`comparison`): 3 openings
  SignExtension         1 opening (`comparison`)
  MaxPool               gates per level of a tournament (`pooling`): 3 openings each
  all others            local
  after each layer      truncation, local (`linear.truncate`)

E = y_C - A of a value that a sign extension made takes 32 - k bits an element instead of 32. There r_C = -A modulo 2^k
(`gate_correlation.draw`), and y_C is -r_C plus what both know plus a multiple of 2^k. So the low k bits of E are those of x + r,
which was opened, and only the high ones are sent. These are masked by the high bits of A, which are independent of r_C.

In an opening both parties send at the same time. `sequential_messages` is the longest chain of messages that wait for one
another, C's E and its part of the next opening going out together: 4 per linear layer with ReLU, 3 per level of a maximum.

Security: by composition. What crosses the links is uniform at its receiver, see `linear` and `comparison`; every mask is used
once, see `correlations.OneTime`. Order, sizes and number of messages follow from the public network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from mpc_fl.inference.fast import layers
from mpc_fl.inference.fast.kernels.bit_planes import pack, packed_bytes, unpack
from mpc_fl.inference.fast.kernels.linear import LinearMap, product_share_of_owner, truncate
from mpc_fl.inference.fast.kernels.pooling import max_pool, maximum, sum_pool
from mpc_fl.inference.fast.network import RING_BITS, IntegerWeights, Network, channels_last, label_bits
from mpc_fl.inference.fast.online.comparison import compare, extend
from mpc_fl.inference.fast.preprocessing.correlations import (
    HospitalCorrelations,
    OneTime,
    OwnerCorrelations,
    level_name,
)
from mpc_fl.inference.fast.preprocessing.cost import MessageChain
from mpc_fl.inference.fast.preprocessing.gate_correlation import GateMaterial
from mpc_fl.links.links import Links

# Told C's and S's own share before each truncation, (N, C, H, W): for tests against the plaintext emulation.
OnTruncation = Callable[[str, np.ndarray], None]


def as_channels_last(values: np.ndarray) -> np.ndarray:
    """(N, C, H, W) to (N, H, W, C); (N, F) stays."""
    return np.ascontiguousarray(values.transpose(0, 2, 3, 1)) if values.ndim == 4 else values


def as_channels_first(values: np.ndarray) -> np.ndarray:
    """(N, H, W, C) to (N, C, H, W); (N, F) stays."""
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2)) if values.ndim == 4 else values


@dataclass(frozen=True)
class EvaluationLink:
    """The link to the other party in one evaluation, whose `number` is in the tags of its messages. All on it is masked."""

    links: Links
    peer: str
    number: int

    def send_masked_value(self, masked: torch.Tensor) -> None:
        """E, int32, of a value that linear layers read, or its high bits packed, uint8: hospital to model owner, in the order of
        the network."""
        self.links.send_tensor(self.peer, f"E {self.number}", masked)

    def receive_masked_value(self, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """The next E, of `shape`. Raises `PeerLostError`, `ProtocolError`."""
        return self.links.receive_tensor(self.peer, f"E {self.number}", dtype, shape)

    def exchange(self, message: np.ndarray, meanwhile: Callable[[], object] | None = None) -> np.ndarray:
        """One opening: send this party's part (uint8), do `meanwhile`, return as many bytes of the other's."""
        tag = f"masked {self.number}"
        self.links.send_tensor(self.peer, tag, torch.from_numpy(message))
        if meanwhile is not None:
            meanwhile()
        return self.links.receive_tensor(self.peer, tag, torch.uint8, message.shape).numpy()


@dataclass(frozen=True, repr=False)
class Extended:
    """Of a value that a sign extension made: k, and x + r modulo 2^k, uint32, which was opened."""

    bits: int
    opened: np.ndarray

    @property
    def high_bits(self) -> int:
        """Bits of E that are sent."""
        return RING_BITS - self.bits


class _PartyEvaluation(ABC):
    """What both parties do alike. `first` is true at the hospital alone: it adds public constants."""

    first: ClassVar[bool]

    def __init__(self, network: Network, link: EvaluationLink, gates: OneTime[GateMaterial]) -> None:
        self.network, self.link, self.gates = network, link, gates
        self.on_truncation: OnTruncation | None = None
        self.chain = MessageChain()
        self.masked = {layer.inputs[0] for layer in network.linear_layers}  # the values that are handed over
        self.extended: dict[str, Extended] = {}

    @abstractmethod
    def hand_over(self, name: str, share: np.ndarray) -> None:
        """A value that linear layers read, the image first of all, is known as shares: the hospital's goes out masked."""

    @abstractmethod
    def linear(self, layer: layers.Convolution | layers.Linear) -> np.ndarray:
        """This party's share of the layer's result before truncation."""

    def evaluate(self, share: np.ndarray) -> np.ndarray:
        """This party's share of the network's output, from its share of the input."""
        network = self.network
        waiting = Counter(name for layer in network.layers for name in layer.inputs) + Counter([network.output])
        values = {network.input: share}
        if network.input in self.masked:
            self.hand_over(network.input, share)
        for layer in network.layers:
            inputs = [values[name] for name in layer.inputs]
            width = network.values[layer.inputs[0]].bits
            result = self._apply(layer, inputs, width)
            if layer.shift:
                if self.on_truncation is not None:
                    self.on_truncation(layer.output, as_channels_first(result) & np.uint32((1 << width) - 1))
                result = truncate(result, width, layer.shift, self.first)
            values[layer.output] = result
            if layer.output in self.masked:
                self.hand_over(layer.output, result)
            waiting.subtract(layer.inputs)
            for name in set(layer.inputs):
                if waiting[name] == 0:
                    del values[name]
        return values[network.output]

    def _apply(self, layer: layers.Layer, inputs: list[np.ndarray], bits: int) -> np.ndarray:
        share = inputs[0]
        mask = np.uint32((1 << bits) - 1)
        match layer:
            case layers.Convolution() | layers.Linear():
                return self.linear(layer)
            case layers.SignExtension():
                result, opened = extend(self.gates.take(layer.output), share.reshape(-1), self.first, self._exchange)
                if layer.output in self.masked:
                    self.extended[layer.output] = Extended(bits, opened.reshape(share.shape))
                return result.reshape(share.shape)
            case layers.ReLU():
                return self._gate(layer.output, share.reshape(-1)).reshape(share.shape)
            case layers.MaxPool():
                return max_pool(layer, share, bits, self.first, self._tournament(layer.output))
            case layers.AveragePool():
                return sum_pool(layer, share) & mask
            case layers.Add():
                return self._sum(layer, inputs) & mask
            case layers.Concatenate():
                return np.concatenate(inputs, axis=-1)
            case layers.Flatten():
                shape = self.network.values[layer.output].shape
                return as_channels_last(as_channels_first(share).reshape(len(share), *shape))
        raise TypeError(f"layer '{layer.path}' of type {type(layer).__name__} has no protocol")

    def _sum(self, layer: layers.Add, inputs: list[np.ndarray]) -> np.ndarray:
        total = np.zeros_like(inputs[0])
        for multiplier, share in zip(layer.multipliers, inputs, strict=True):
            total += share if multiplier == 1 else share * np.uint32(multiplier & 0xFFFFFFFF)
        if self.first:
            total += np.uint32(layer.constant & 0xFFFFFFFF)
        return total

    def _gate(self, name: str, share: np.ndarray) -> np.ndarray:
        return compare(self.gates.take(name), share, self.first, self._exchange)

    def _tournament(self, name: str) -> Callable[[np.ndarray], np.ndarray]:
        levels = iter(range(1 << 20))
        return lambda share: self._gate(level_name(name, next(levels)), share)

    def _exchange(self, message: np.ndarray, meanwhile: Callable[[], object] | None = None) -> np.ndarray:
        theirs = self.link.exchange(message, meanwhile)
        self.chain.both()
        return theirs

    def label_share(self, logits: np.ndarray) -> np.ndarray:
        """Shares modulo 2^m of the index of each record's largest logit (N,), m as in `label_bits`.

        The index is written below the logit's lowest bit, so the maximum carries it along; of equal logits the last wins.
        Both factors are public, so this is local but for the tournament over the classes.
        """
        bits, index_bits = label_bits(self.network)
        width = bits + index_bits
        packed = logits << np.uint32(index_bits)
        if self.first:
            packed += np.arange(packed.shape[1], dtype=np.uint32)
        packed &= np.uint32((1 << width) - 1)
        candidates = [np.ascontiguousarray(packed[:, place]) for place in range(packed.shape[1])]
        winner = maximum(candidates, width, self._tournament("label"))
        return winner & np.uint32((1 << index_bits) - 1)


class HospitalEvaluation(_PartyEvaluation):
    """C's side of one evaluation, which uses up `correlations`."""

    first = True

    def __init__(self, network: Network, link: EvaluationLink, correlations: HospitalCorrelations) -> None:
        super().__init__(network, link, correlations.gates)
        self._masks, self._products = correlations.masks, correlations.products

    def hand_over(self, name: str, share: np.ndarray) -> None:
        """Mask this share, at first the image itself, and send it: E = y_C - A.

        A is uniform and used once; C expands it from the seed that it has in common with the dealer, so S does not know it.
        """
        masked = torch.from_numpy(share.view(np.int32)) - self._masks.take(name)
        extended = self.extended.pop(name, None)
        if extended is not None:
            high = masked.numpy().view(np.uint32).reshape(-1) >> np.uint32(extended.bits)
            masked = torch.from_numpy(pack(high, extended.high_bits))
        self.link.send_masked_value(masked)
        self.chain.from_hospital()

    def linear(self, layer: layers.Convolution | layers.Linear) -> np.ndarray:
        """z_C, ready before the image."""
        return self._products.take(layer.output).numpy().view(np.uint32)


class OwnerEvaluation(_PartyEvaluation):
    """S's side of one evaluation, which uses up `correlations`. `weights` are those of `integers`, ready to use."""

    first = False

    def __init__(
        self,
        network: Network,
        link: EvaluationLink,
        correlations: OwnerCorrelations,
        weights: Mapping[str, LinearMap],
        integers: IntegerWeights,
    ) -> None:
        super().__init__(network, link, correlations.gates)
        self._products, self._weights, self._biases = correlations.products, weights, integers.biases
        self._masked: dict[str, torch.Tensor] = {}
        self._readers: Counter[str] = Counter()

    def hand_over(self, name: str, share: np.ndarray) -> None:
        """Keep y_S until E arrives."""
        self._masked[name] = torch.from_numpy(share.view(np.int32))
        self.chain.from_hospital()

    def _receive(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """E."""
        extended = self.extended.pop(name, None)
        if extended is None:
            return self.link.receive_masked_value(shape)
        count, bits = extended.opened.size, extended.high_bits
        packed = self.link.receive_masked_value((packed_bytes(bits, count),), torch.uint8)
        high = unpack(packed.numpy(), bits, count).reshape(shape)
        return torch.from_numpy(((high << np.uint32(extended.bits)) | extended.opened).view(np.int32))

    def linear(self, layer: layers.Convolution | layers.Linear) -> np.ndarray:
        """z_S = W * (E + y_S) + u_S + bias."""
        name = layer.inputs[0]
        if self._readers[name] == 0:
            mine = self._masked[name]
            self._masked[name] = self._receive(name, tuple(mine.shape)).add_(mine)
        self._readers[name] += 1
        correction, bias = self._products.take(layer.output), self._biases[layer.output]
        share = product_share_of_owner(self._weights[layer.output], self._masked[name], correction, bias)
        if self._readers[name] == sum(name == other.inputs[0] for other in self.network.linear_layers):
            del self._masked[name]
        return share.numpy().view(np.uint32)


def empty_share(network: Network, records: int) -> np.ndarray:
    """S's share of the input: zeros, because C knows it all."""
    return np.zeros(channels_last(network.values[network.input].shape, records), dtype=np.uint32)


def aligned_elements(share: np.ndarray, bits: int) -> torch.Tensor:
    """A share modulo 2^bits as int32 share modulo 2^32 of the same value times 2^(32 - bits): its sign is bit 31."""
    return torch.from_numpy((share << np.uint32(RING_BITS - bits)).view(np.int32))
