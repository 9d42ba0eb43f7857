"""What a clipped step costs beside a plain one: layers, hooks, vmap and loop on two models.

    python benchmarks/per_sample_gradients.py [--json] [--threads 1] [--repeats 3]

A plain step is one forward and backward pass of the batch. Each figure is the shortest of the repeats. The noise of one
step is timed besides. `hooks` runs with GroupNorm only, because Opacus refuses BatchNorm, frozen or not; `layers` with frozen
BatchNorm only, which it folds into convolutions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, get_args

import torch

from mpc_fl.config.config import Config
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import ModelError
from mpc_fl.learning.models.architectures import build_model
from mpc_fl.learning.models.batch_norm import calibrate_batchnorm
from mpc_fl.learning.models.parameters import flatten_parameters
from mpc_fl.learning.models.rewriting import without_in_place
from mpc_fl.learning.training.noised_optimizer import gaussian_noise
from mpc_fl.learning.training.per_sample_gradients import Method, clipped_sum, sum_cross_entropy

CASES = (
    ("resnet18", "frozen", (3, 96, 96), 16),
    ("resnet18", "group", (3, 96, 96), 16),
    ("small_cnn", "frozen", (1, 32, 32), 64),
    ("small_cnn", "group", (1, 32, 32), 64),
    ("small_cnn", "frozen", (1, 64, 64), 64),
)


def shortest(action: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run after one to warm up."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(architecture: str, normalisation: str, shape: tuple[int, ...], batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of a plain step, of the noise, and of each method (null where it cannot be used)."""
    config = Config().with_values(model={"architecture": architecture, "normalisation": normalisation})
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, *shape, generator=generator)
    labels = torch.randint(0, 3, (batch,), generator=generator)
    model = build_model(config, input_shape=shape, seed=0)
    calibrate_batchnorm(model, inputs)
    pure = without_in_place(model.eval())
    parameters = [parameter for parameter in pure.parameters() if parameter.requires_grad]
    size = len(flatten_parameters(pure))
    noise_seed = Seed.from_system()
    calls = iter(range(repeats + 1))

    def clipped_step(method: Method) -> float | None:
        try:
            return shortest(
                lambda: clipped_sum(pure, sum_cross_entropy, inputs, labels, 1.0, method),
                repeats,
            )
        except ModelError:
            return None

    return {
        "architecture": architecture,
        "normalisation": normalisation,
        "shape": list(shape),
        "batch": batch,
        "parameters": size,
        "plain_seconds": shortest(
            lambda: torch.autograd.grad(sum_cross_entropy(pure(inputs), labels), parameters), repeats
        ),
        "noise_seconds": shortest(lambda: gaussian_noise(noise_seed.stream(next(calls)), (size,)), repeats),
        "seconds": {method: clipped_step(method) for method in get_args(Method)},
    }


def main() -> None:
    """Measure all cases and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [measure(*case, repeats=options.repeats) for case in CASES]
    if options.json:
        print(json.dumps({"threads": options.threads, "torch": torch.__version__, "results": results}, indent=2))
        return
    print(
        f"{'model':32} {'batch':>5} {'plain':>9} {'noise':>9} {'layers':>7} {'hooks':>7} {'vmap':>7} {'loop':>7}   (times plain)"
    )
    for result in results:
        name = f"{result['architecture']} {result['normalisation']} {'x'.join(map(str, result['shape']))}"
        ratios = [
            f"{seconds / result['plain_seconds']:6.2f}x" if seconds is not None else f"{'-':>7}"
            for seconds in (result["seconds"][method] for method in ("layers", "hooks", "vmap", "loop"))
        ]
        print(
            f"{name:32} {result['batch']:5} {result['plain_seconds']:8.4f}s {result['noise_seconds']:8.4f}s "
            + " ".join(ratios)
        )


if __name__ == "__main__":
    main()
