"""A hospital because of which every sum that it is in is made anew: it must not drain the budgets of the others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.deviating import Federation

ROUNDS = 4


def nonsense_in_every_check(_evidence: Path) -> None:
    from mpc_fl.aggregation import norm_check

    norm_check.to_words = lambda elements: torch.zeros((3, 2), dtype=torch.int64)  # type: ignore[assignment, misc]


@pytest.mark.processes
@pytest.mark.slow
def test_whoever_costs_sums_sits_out_ever_more_rounds(tmp_path: Path) -> None:
    """Rounds 1, 2 and 4 are made anew without it. Before, each was lost in every attempt, and charged as often."""
    federation = Federation(
        tmp_path,
        federation={"quorum": 2},
        aggregation={"norm_check": True, "weighted": False},
        training={"rounds": ROUNDS, "local_steps": 2, "batch_size": 16, "per_sample_gradients": "vmap"},
        privacy={"mechanism": "local", "noise_multiplier": 2.0, "delta": 1e-3, "epsilon": 50.0, "spare_rounds": 6},
    )
    said = federation.run({"hospital-2": nonsense_in_every_check})
    for name in ("hospital-0", "hospital-1"):
        charged = Counter(record["round"] for record in federation.charges(name))
        assert said[name] == "finished" and set(charged) == set(range(1, ROUNDS + 1))
        assert max(charged.values()) <= 2 and sum(charged.values()) <= ROUNDS + 3, charged
