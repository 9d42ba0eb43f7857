"""The benchmark of encrypted diagnosis, on a size that ends soon. No figure of speed is tested."""

from __future__ import annotations

import pytest

from mpc_fl.apps.bench.inference import measure_inference
from mpc_fl.errors import ModelError


@pytest.mark.slow
@pytest.mark.processes
def test_the_benchmark_compares_three_ways_on_one_network() -> None:
    figures = measure_inference("resnet18", 32, 2, 1, "crypten")
    for name in (
        "speedup_vs_crypten",
        "ratio_vs_plaintext",
        "bytes_sent_per_party",
        "offline_seconds",
        "peak_memory_bytes",
    ):
        assert getattr(figures, name) > 0
    assert figures.sequential_messages == 82
    assert figures.same_class and figures.max_logit_error < 0.02
    assert figures.crypten_max_logit_error < 0.1  # the baseline computes the same network
    assert len(figures.online_seconds_of_each) == 2


def test_a_network_that_does_not_fit_is_refused_before_processes_start() -> None:
    with pytest.raises(ModelError, match="windows that differ in size"):
        measure_inference("vgg11", 64, 1, 1, "none")
