"""Latency and throughput of secret randomness beside `torch.Generator`, in one run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mpc_fl.crypto.stream_cipher import Seed

SIZES = (128, 1024, 16_384, 1 << 20, 1 << 24)
_BYTES = 8


def _times(actions: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each run of each action, in turn for `seconds` in all, so that a busy machine slows all alike."""
    for action in actions.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return times


@dataclass(frozen=True)
class Speed:
    """Of one way to draw: the median latency, and the throughput of the best run."""

    microseconds: float
    gigabytes_per_second: float


@dataclass(frozen=True)
class RandomnessFigures:
    """Of one number of int64 ring elements on one core.

    `draw`: a new label and its elements in a new tensor. `add`: a new label, added to a tensor that is there.
    `randint`: as stock CrypTen draws, in a new tensor. `random_`: torch's fastest, 63 bits into a tensor that is there.
    `ratio` is draw / randint in GB/s.
    """

    elements: int
    draw: Speed
    add: Speed
    randint: Speed
    random_: Speed
    ratio: float

    def to_json(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return asdict(self)


def _measure_size(size: int, seconds: float) -> RandomnessFigures:
    seed, label = Seed.from_system(), itertools.count()
    generator, total = torch.Generator(), torch.zeros(size, dtype=torch.int64)
    generator.seed()
    actions: dict[str, Callable[[], object]] = {
        "draw": lambda: seed.stream("bench", next(label)).ring_elements((size,)),
        "add": lambda: seed.stream("bench", next(label)).add_to(total),
        "randint": lambda: torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator),
        "random_": lambda: total.random_(generator=generator),
    }
    speeds = {
        name: Speed(1e6 * statistics.median(times), _BYTES * size / min(times) / 1e9)
        for name, times in _times(actions, seconds).items()
    }
    ratio = speeds["draw"].gigabytes_per_second / speeds["randint"].gigabytes_per_second
    return RandomnessFigures(elements=size, **speeds, ratio=ratio)


def measure_randomness(sizes: tuple[int, ...] = SIZES, seconds: float = 1.0) -> list[RandomnessFigures]:
    """Latency and throughput of each way to draw, for each number of elements in turn; `seconds` are those of one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure_size(size, seconds) for size in sizes]
    finally:
        torch.set_num_threads(threads)
