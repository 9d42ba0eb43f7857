"""Encrypted inference, engine `reference`: any supported network on secret-shared weights and images.

The model owner shares its weights, the hospital its image; both walk the same list of crypten.nn layers on their shares
and only the logits are opened (Knott et al., NeurIPS 2021). The network is recorded with torch.fx, see
`graph.tracing`; its layers on shares are in `layers`, their functions in `approximations`, what a run costs in `cost`.

Who learns what. Nobody anything from the layers: what they open is masked by the dealer's tuples. `diagnosis` shares the
image, opens the logits, and states rounds, bytes and the security argument; `cost` counts them before a run.

Truncation. Two parties truncate a product by shifting their shares alone (SecureML, Mohassel and Zhang, S&P 2017,
section 4.1). A product x with f fractional bits is held as x 2^(2f) in Z_2^64 and its two shares wrap with
probability |x| 2^(2f - 64). At f = 16 that is |x| 2^-32 for every output of a convolution or linear layer. A wrapped
element is off by 2^32 with the sign opposite to its own:

- x < 0 becomes 2^32 - |x|, passes ReLU, and reaches the logits as numbers of order 2^31, which `within_bound` sees. To
  slip through, all k logits would have to fall within the bound B by chance: about (2 B / 2^32)^k, 10^-17 for
  B = 4096 and k = 3. In a simulation 22 of 22 such elements of ResNet18 were caught.
- x > 0 becomes x - 2^32, which ReLU turns into 0 and max-pool passes over: nobody sees it, one activation is missing.
  18 of 18 in the simulation went unseen and moved a logit by 0.05 at most (64x64 images).

ResNet18 at 224x224 truncates 2.48 million elements of mean magnitude 0.80 (BatchNorm calibrated, first weights), so the
probability that any element of an image wraps is 4.6e-4, one image in 2200; half of them are caught and get no result. The
other half, one image in 4300, loses one activation, which moved a logit by 0.001 in the median and 0.008 at most in 60
trials. With f fractional bits the probability changes by 4^(f - 16).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpc_fl.errors import HeadroomError, ModelError
from mpc_fl.inference.graph.tracing import simplify, trace
from mpc_fl.inference.reference.approximations import Secret
from mpc_fl.inference.reference.cost import ShapeTensor, Tally, module_with, on_shapes
from mpc_fl.inference.reference.layers import crypten_module
from mpc_fl.sharing.crypten_parts import crypten

# Called before each layer runs: index from 1, number of layers, name.
OnLayer = Callable[[int, int, str], None]
# Folded weights beyond this leave too little room for products in 64 bits.
_LARGEST_WEIGHT = 2.0**15


@dataclass(frozen=True, eq=False)
class EncryptedLayer:
    """One layer on shares: `module` applied to the values `inputs` gives the value `name`; `path` is the user's name.

    Its weights are plain until `EncryptedGraph.encrypt`, which shares them.
    """

    name: str
    path: str
    kind: str
    module: Any  # crypten.nn.Module
    inputs: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class EncryptedGraph:
    """A network as a list of layers in order of execution. Build it with `build_graph`."""

    layers: tuple[EncryptedLayer, ...]
    input: str
    output: str

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Paths of the layers as the user knows them, in order of execution."""
        return tuple(layer.path for layer in self.layers)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Public shapes of the private weights, by layer and parameter name. Equal at both parties."""
        return {
            f"{layer.name}.{name}": tuple(parameter.size())
            for layer in self.layers
            for name, parameter in layer.module.named_parameters()
        }

    def encrypt(self, src: int) -> EncryptedGraph:
        """The graph with weights shared by rank `src`; of the weights at other ranks only the shapes count.

        Needs an initialised CrypTen runtime; sends nothing, because shares of the other ranks are pseudo-random.
        Rounds the weights to fixed point. Raises `HeadroomError` at `src` for weights beyond 2^15.
        """
        layers = []
        with crypten.no_grad(), torch.no_grad():
            for layer in self.layers:
                module = module_with(layer.module, {})
                for name, parameter in layer.module.named_parameters():
                    if isinstance(parameter, crypten.CrypTensor):
                        raise ModelError("the graph is encrypted already", "encrypt it once, after build_graph")
                    mine = crypten.communicator.get().get_rank() == src
                    if mine and float(parameter.abs().max()) > _LARGEST_WEIGHT:
                        raise HeadroomError(
                            f"layer '{layer.path}' has a {name} beyond {_LARGEST_WEIGHT:.0f} after folding BatchNorm",
                            "retrain it, or raise eps of its BatchNorm",
                        )
                    # CrypTen encodes by cutting off; a rounded weight is encoded exactly and without bias.
                    scale = crypten.encoder.FixedPointEncoder().scale
                    module.register_parameter(name, (parameter.double() * scale).round().div(scale), False)
                layers.append(dataclasses.replace(layer, module=module.encrypt(src=src)))
        return dataclasses.replace(self, layers=tuple(layers))

    def forward(self, x: Secret, on_layer: OnLayer | None = None) -> Secret:
        """Logits (N, K) of the images `x` (N, C, H, W), both MPCTensors. Call `encrypt` first.

        `on_layer` is told of each layer before it runs. A value is freed once its last user ran.
        """
        with crypten.no_grad(), torch.no_grad():
            return run_layers(self.layers, self.input, self.output, x, on_layer)


def run_layers(
    layers: Sequence[EncryptedLayer], input: str, output: str, x: Secret, on_layer: OnLayer | None = None
) -> Secret:
    """Apply `layers` in order to `x` and return the value named `output`."""
    waiting = Counter(name for layer in layers for name in layer.inputs) + Counter([output])
    values = {input: x}
    for index, layer in enumerate(layers, start=1):
        if on_layer is not None:
            on_layer(index, len(layers), layer.path)
        values[layer.name] = layer.module(*[values[name] for name in layer.inputs])
        waiting.subtract(layer.inputs)
        for name in set(layer.inputs):
            if waiting[name] == 0:
                del values[name]
    return values[output]


def build_graph(model: nn.Module, input_shape: Sequence[int] | None = None) -> EncryptedGraph:
    """The encrypted counterpart of `model`, which is left as it is and must be in evaluation mode.

    The party without weights passes the same architecture with any weights, or on the meta device: only shapes matter,
    and those do not depend on the weights. With `input_shape`, (C, H, W) of one image, shapes are followed through the
    network at once. Nothing is sent and CrypTen need not be running.

    Raises `UnsupportedLayerError` naming a layer without encrypted counterpart and the nearest supported one,
    `ModelError` for a network that cannot be traced, has weights that are not finite or does not fit `input_shape`.
    """
    graph = simplify(trace(model))
    layers = tuple(EncryptedLayer(op.name, op.path, op.kind, crypten_module(op), op.inputs) for op in graph.operations)
    result = EncryptedGraph(layers, graph.input, graph.output)
    if input_shape is not None:
        cost(result, (1, *input_shape))
    return result


def cost(graph: EncryptedGraph, input_shape: Sequence[int], parties: int = 2) -> dict[str, int]:
    """What one forward pass on `input_shape` (N, C, H, W) costs, from shapes alone; weights may be encrypted or not.

    `comparisons` and `multiplications` of secret elements (a convolution counts each multiply-add), `bytes_per_party`
    that each party sends to the others, `rounds` of messages, `truncations` (elements that go through the truncation
    above) and `opened_weights` (bytes within `bytes_per_party` spent on masked weights). Sharing the input and
    the weights sends nothing; opening the logits, 8 bytes each, and the dealer's messages are not included.
    Raises `ModelError` if the layers do not fit the shape.
    """
    tally = Tally(parties)
    shapes = [dataclasses.replace(layer, module=on_shapes(layer.module, tally)) for layer in graph.layers]
    x = ShapeTensor(torch.empty(tuple(input_shape), device="meta"), tally)
    reached: list[str] = []
    try:
        run_layers(shapes, graph.input, graph.output, x, lambda _index, _total, name: reached.append(name))
    except (RuntimeError, IndexError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        raise ModelError(
            f"layer '{reached[-1]}' does not fit inputs of shape {tuple(input_shape)}: {reason}",
            "check data.image_size and data.channels",
        ) from None
    return tally.summary()


def within_bound(logits: torch.Tensor, bound: float) -> torch.Tensor:
    """Which rows of opened logits, float (N, K), no failed truncation has blown up, bool (N,): finite, and none > `bound`.

    The module's docstring says how often a truncation fails and what this cannot see. It is for the hospital alone: a
    model can be made so that the answer is a bit about the image.
    """
    return (logits.abs() <= bound).all(dim=1)  # false for NaN
