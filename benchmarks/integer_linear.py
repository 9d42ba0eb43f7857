"""How fast convolutions modulo 2^32 are: all convolutions and linear layers of a network, one after the other.

    python benchmarks/integer_linear.py [--network resnet18] [--size 224] [--batch 1] [--json]

`online` multiplies weights of 16 bits (two limbs) with elements of 32 bits, as the model owner does for each image;
`offline` multiplies 32 with 32 bits, as the dealer and the hospital do. Beside them torch's own int64 convolution (the
exact fallback), float32 convolution (the plaintext network), and `online` by the fastest method without compiled kernels
(`torch`), all in the same run. Seconds are the sum over layers of the shortest of the repeats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mpc_fl.config.config import Config
from mpc_fl.inference.fast.kernels import integer_linear
from mpc_fl.inference.fast.kernels.compiled import kernels
from mpc_fl.inference.fast.kernels.limbs import usable
from mpc_fl.learning.models.architectures import build_model

Layer = tuple[nn.Conv2d | nn.Linear, torch.Size]


def layers_of(network: str, size: int, batch: int) -> list[Layer]:
    """Convolutions and linear layers with the shape of their input, in order."""
    config = Config().with_values(model={"architecture": network}, data={"channels": 3, "image_size": size})
    model = build_model(config, input_shape=(3, size, size), seed=0)
    found: list[Layer] = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(lambda layer, inputs: found.append((layer, inputs[0].shape)))
    with torch.no_grad():
        model(torch.zeros(batch, 3, size, size))
    return found


def shortest(action: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run after one to warm up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(layer: nn.Conv2d | nn.Linear, shape: torch.Size, repeats: int) -> dict[str, Any]:
    """Seconds of one layer by each arithmetic, and which method was chosen."""
    draw = torch.Generator().manual_seed(0)

    def elements(of: tuple[int, ...], bits: int) -> torch.Tensor:
        return torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), of, generator=draw).to(torch.int32)

    full, weights = elements(tuple(shape), 32), elements(tuple(layer.weight.shape), 15)
    mask = elements(tuple(layer.weight.shape), 32)
    special = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
    without: integer_linear.Method = "taps" if special else usable()[0]
    if isinstance(layer, nn.Linear):
        online, offline = integer_linear.PreparedLinear(weights), integer_linear.PreparedLinear(mask)
        by_torch = integer_linear.PreparedLinear(weights, without)
        plain: Callable[..., torch.Tensor] = functional.linear
        outputs = layer.out_features * shape[0]
    else:
        options = (layer.stride, layer.padding, layer.dilation, layer.groups)
        online = integer_linear.PreparedConvolution(weights, *options)  # type: ignore[assignment,arg-type]
        offline = integer_linear.PreparedConvolution(mask, *options)  # type: ignore[assignment,arg-type]
        by_torch = integer_linear.PreparedConvolution(weights, *options, without)  # type: ignore[assignment,arg-type]
        full = full.contiguous(memory_format=torch.channels_last)

        def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return functional.conv2d(x, w, None, *options)

        outputs = online(full).numel()
    exact = plain(full.long(), weights.long()).to(torch.int32)
    if not torch.equal(online(full), exact):
        raise SystemExit(f"{layer} is not exact")
    real, real_weights, long, long_weights = full.float(), weights.float(), full.long(), weights.long()
    return {
        "layer": str(layer),
        "multiply_adds": outputs * layer.weight[0].numel(),
        "online_seconds": shortest(lambda: online(full), repeats),
        "torch_seconds": shortest(lambda: by_torch(full), repeats),
        "offline_seconds": shortest(lambda: offline(full), repeats),
        "int64_seconds": shortest(lambda: plain(long, long_weights), 1),
        "float32_seconds": shortest(lambda: plain(real, real_weights), repeats),
    }


def main() -> None:
    """Measure one network and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    methods = usable()
    self_test = time.perf_counter() - start
    with torch.no_grad():
        layers = layers_of(options.network, options.size, options.batch)
        rows = [measure(layer, shape, options.repeats) for layer, shape in layers]
    sums = {key: sum(row[key] for row in rows) for key in rows[0] if key != "layer"}
    result = {
        **vars(options),
        "kernels": str(kernels()),
        "usable": methods,
        "self_test_seconds": self_test,
        **sums,
        "online_giga_multiply_adds_per_second": sums["multiply_adds"] / sums["online_seconds"] / 1e9,
        "speedup_online_over_torch": sums["torch_seconds"] / sums["online_seconds"],
        "speedup_online_over_int64": sums["int64_seconds"] / sums["online_seconds"],
        "speedup_offline_over_int64": sums["int64_seconds"] / sums["offline_seconds"],
        "ratio_online_to_float32": sums["online_seconds"] / sums["float32_seconds"],
        "methods_chosen": dict(Counter(integer_linear.chosen_methods())),
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(
        f"{'layer':76} {'M mult.':>8} {'online':>8} {'torch':>8} {'offline':>8} {'int64':>8} {'float32':>8}   (milliseconds)"
    )
    for row in rows:
        times = " ".join(f"{1000 * row[key]:8.2f}" for key in row if key.endswith("seconds"))
        print(f"{row['layer'][:76]:76} {row['multiply_adds'] / 1e6:8.1f} {times}")
    for key, value in result.items():
        print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    main()
