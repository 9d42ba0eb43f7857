"""Samples of integer Gaussian noise per second, and what the distributed mechanism adds to a training step.

    python benchmarks/integer_noise.py [--json] [--samples 16777216] [--threads 2] [--repeats 5] [--parameters 11178051]

Every figure is the best of the repeats. `per core` divides by processor time, which other programs on the machine
disturb least; `one thread` and `all threads` are by the clock. The mechanism's part: rounding one patient's gradient into
the sum, and one hospital's noise for one step, beside the float noise of `privacy.mechanism: local`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from mpc_fl.crypto.secrecy import Private
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.learning.privacy.discrete_gaussian import DiscreteGaussian
from mpc_fl.learning.privacy.distributed_gaussian import MechanismTerms, add_patients, noised_share, plan_mechanism
from mpc_fl.learning.training.noised_optimizer import gaussian_noise

VARIANCE_BITS = (0, 10, 20, 30, 40, 50)


def best(action: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Shortest seconds by the clock and of processor time, after one run to warm up."""
    action()
    times = []
    for _ in range(repeats):
        clock, processor = time.perf_counter(), time.process_time()
        action()
        times.append((time.perf_counter() - clock, time.process_time() - processor))
    return min(one for one, _ in times), min(one for _, one in times)


def sampling(bits: int, samples: int, threads: int, repeats: int) -> dict[str, float]:
    """Millions of samples a second of variance 2^bits."""
    sampler = DiscreteGaussian(1 << bits)
    total = torch.zeros(samples, dtype=torch.int32 if sampler.largest < 1 << 31 else torch.int64)
    one, processor = best(lambda: sampler.add_to(total, Seed.from_system()), repeats)
    all_threads, _ = best(lambda: sampler.add_to(total, Seed.from_system(), threads), repeats)
    rates = {"per_core": processor, "one_thread": one, "all_threads": all_threads}
    return {"variance_bits": bits, **{name: samples / seconds / 1e6 for name, seconds in rates.items()}}


def mechanism(parameters: int, threads: int, repeats: int) -> dict[str, Any]:
    """Seconds (clock, best) of the mechanism's parts for a model of `parameters`, three hospitals, one colluder."""
    plan = plan_mechanism(
        MechanismTerms(
            parameters=parameters,
            hospitals=3,
            colluders=1,
            expected_patients=64,
            clipping_norm=1.0,
            noise_multiplier=1.0,
        )
    )
    total, gradient = torch.zeros(parameters, dtype=plan.dtype), torch.randn(1, parameters)
    rounding, _ = best(lambda: add_patients(plan, total.zero_(), [gradient]), repeats)
    secret = Private("clipped sum", total)
    noise, _ = best(lambda: noised_share(plan, secret, Seed.from_system(), threads), repeats)
    local, _ = best(lambda: gaussian_noise(Seed.from_system().stream("x"), (parameters,)), 1)
    return {
        "parameters": parameters,
        "ring_bits": plan.ring_bits,
        "sensitivity_bits": plan.sensitivity.bit_length() - 1,
        "variance_bits_of_a_share": math.log2(plan.noise_share.variance),
        "rounding_seconds_per_patient": rounding,
        "noise_seconds_per_step": noise,
        "local_noise_seconds_per_step": local,
        "speedup_of_noise": local / noise,
    }


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--samples", type=int, default=1 << 24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parameters", type=int, default=11_178_051)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = [sampling(bits, options.samples, options.threads, options.repeats) for bits in VARIANCE_BITS]
    parts = mechanism(options.parameters, options.threads, options.repeats)
    if options.json:
        print(json.dumps({"threads": options.threads, "millions_per_second": rates, "mechanism": parts}, indent=2))
        return
    print(
        f"{'variance':>9} {'per core':>10} {'one thread':>11} {options.threads:>2} threads   (million samples a second)"
    )
    for rate in rates:
        print(
            f"{'2^' + str(rate['variance_bits']):>9} {rate['per_core']:10.1f} {rate['one_thread']:11.1f} "
            f"{rate['all_threads']:10.1f}"
        )
    print(
        f"{parts['parameters']} parameters: {parts['rounding_seconds_per_patient']:.3f} s to clip and round a patient, "
        f"{parts['noise_seconds_per_step']:.3f} s noise a step (local: {parts['local_noise_seconds_per_step']:.3f} s)"
    )


if __name__ == "__main__":
    main()
