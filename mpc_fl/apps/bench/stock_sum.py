"""The sum of updates in stock CrypTen, over gloo without encryption: every party shares its update with all, sums, opens to one.

As its users run it, without the large pages that this project gives its processes.
"""

from __future__ import annotations

import statistics
import time

import torch

from mpc_fl.apps.bench.stock_crypten import stock_crypten
from mpc_fl.apps.bench.timed_rounds import Size, Task, run_parties


def stock_sum_seconds(size: Size) -> float:
    """Seconds of a round, the median of the slowest party. Raises `RunFailedError` when a process fails or is late."""
    return max(run_parties(_rounds, "sum in stock CrypTen", size, linked=False))


def _rounds(name: str, task: Task, update: torch.Tensor) -> float:
    import torch.distributed as distributed

    seconds, parties = [], task.size.parties
    with stock_crypten(task.hospitals.index(name), parties, task.folder / "store") as crypten:
        for _ in range(task.size.repeats + 1):  # the first one warms up
            distributed.barrier()
            began = time.perf_counter()
            total = sum(crypten.cryptensor(update, src=source) for source in range(parties))
            total.get_plain_text(dst=0)
            distributed.barrier()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
