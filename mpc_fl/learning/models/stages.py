"""Features of several blocks of a network: the averages of their outputs over all pixels, one beside the other.

Early blocks know textures, late ones objects of what the network was trained on; which of them helps with other images is a matter
of trial (Yosinski et al., NeurIPS 2014). What comes after the last block that is named is not computed.
"""

from __future__ import annotations

import difflib

import torch
from torch import fx, nn

from mpc_fl.errors import ModelError
from mpc_fl.learning.models.rewriting import tidied, without_in_place

_FIX = "correct data.features.stages"


class Stages(nn.Module):
    """Float32 images (N, C, H, W) to (N, F): of each block at `paths` the averages of its output, each at L2 norm 1.

    An output is (N, channels, H', W') or (N, channels). `network` stays as it is. Raises `ModelError` for blocks that are not there
    or have not one output, and for networks that cannot be traced.
    """

    def __init__(self, network: nn.Module, paths: tuple[str, ...]) -> None:
        super().__init__()
        self._paths = paths
        self._outputs = _with_outputs_of(network, paths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The joined averages."""
        return torch.cat([self._average(*item) for item in zip(self._paths, self._outputs(x), strict=True)], dim=1)

    def _average(self, path: str, output: object) -> torch.Tensor:
        if not isinstance(output, torch.Tensor) or output.dim() not in (2, 4):
            raise ModelError(f"the output of '{path}' in the feature extractor is no map of channels", _FIX)
        return nn.functional.normalize(output.flatten(2).mean(dim=2) if output.dim() == 4 else output, dim=1)


def _with_outputs_of(network: nn.Module, paths: tuple[str, ...]) -> fx.GraphModule:
    """The network with these blocks' outputs for its value, a tuple."""
    blocks = [name for name, _ in network.named_modules() if name]
    for path in paths:
        if path not in blocks:
            near = difflib.get_close_matches(path, blocks, n=1, cutoff=0.0)
            raise ModelError(f"the feature extractor has no block '{path}'", f"the nearest known name is '{near[0]}'")
    traced = without_in_place(network)
    outputs = tuple(_output_of(traced, path) for path in paths)
    (end,) = (node for node in traced.graph.nodes if node.op == "output")
    end.args = (outputs,)
    traced.graph.eliminate_dead_code()
    return tidied(traced)


def _output_of(traced: fx.GraphModule, path: str) -> fx.Node:
    """The one value of a block that others use."""
    inside = {node for node in traced.graph.nodes if path in _blocks_around(node)}
    used = [node for node in traced.graph.nodes if node in inside and any(user not in inside for user in node.users)]
    if len(used) != 1:
        raise ModelError(f"block '{path}' of the feature extractor has {len(used)} outputs", _FIX)
    return used[0]


def _blocks_around(node: fx.Node) -> set[str]:
    """Paths of the blocks in whose forward pass an operation was recorded."""
    return {path for path, _ in node.meta.get("nn_module_stack", {}).values()}
