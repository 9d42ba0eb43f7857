"""Encrypted inference as stock CrypTen does it: the baseline of `bench.inference`. Never used for patients' data.

Its links are not encrypted, its first party makes all triples and could read everything, and its masks can be predicted
(tests/sharing/test_randomness.py). The network is walked with CrypTen's own functions, BatchNorm folded (which favours it).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpc_fl.apps.bench.stock_crypten import stock_crypten
from mpc_fl.errors import UnsupportedLayerError
from mpc_fl.inference.graph.tracing import Operation, fold_affine, remove_identities, remove_unused, trace
from mpc_fl.sharing.crypten_parts import crypten

_HOSPITAL, _MODEL_OWNER = 0, 1


def stock_crypten_logits(
    rank: int, store: Path, model: nn.Module, images: torch.Tensor
) -> tuple[float, torch.Tensor | None]:
    """Seconds from sharing the image to the opened logits, and the logits (N, K), opened to rank 0 (None elsewhere).

    Weights are shared before. Call it at ranks 0 and 1 of two processes that can both reach the file `store`; what the
    other party does not hold counts by its shape alone. Raises `UnsupportedLayerError` for what this baseline lacks.
    """
    graph = remove_unused(fold_affine(remove_identities(trace(model))))
    with stock_crypten(rank, 2, store), crypten.no_grad():
        weights = {
            operation.name: {key: crypten.cryptensor(t, src=_MODEL_OWNER) for key, t in operation.tensors.items()}
            for operation in graph.operations
        }
        began = time.perf_counter()
        values = {graph.input: crypten.cryptensor(images, src=_HOSPITAL)}
        for operation in graph.operations:
            inputs = [values[name] for name in operation.inputs]
            values[operation.name] = _apply(operation, inputs, weights[operation.name])
        logits = values[graph.output].get_plain_text(dst=_HOSPITAL)
        seconds = time.perf_counter() - began
    return seconds, logits


def _apply(operation: Operation, inputs: Sequence[Any], weights: dict[str, Any]) -> Any:
    x, options = inputs[0], operation.options
    match operation.kind:
        case "Conv2d":
            geometry = {key: options[key] for key in ("stride", "padding", "dilation", "groups")}
            result = x.conv2d(weights["weight"], **geometry)
            return result + weights["bias"].view(1, -1, 1, 1) if "bias" in weights else result
        case "Linear":
            result = x.matmul(weights["weight"].t())
            return result + weights["bias"] if "bias" in weights else result
        case "ReLU":
            return x.relu()
        case "MaxPool2d":
            geometry = {key: options[key] for key in ("stride", "padding", "dilation", "ceil_mode")}
            return x.max_pool2d(options["kernel_size"], **geometry)
        case "AvgPool2d":
            return x.avg_pool2d(options["kernel_size"], stride=options["stride"], padding=options["padding"])
        case "AdaptiveAvgPool2d":
            return x.adaptive_avg_pool2d(options["output_size"])
        case "Add":
            return x + inputs[1]
        case "Concat":
            return crypten.cat(list(inputs), dim=options["dim"])
        case "Flatten":
            return x.flatten(start_dim=options["start_dim"])
    raise UnsupportedLayerError(
        f"layer '{operation.path}' ({operation.kind}) is not in the stock CrypTen baseline", "use --against none"
    )
