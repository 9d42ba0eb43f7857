"""What a run keeps does not grow with its rounds, but for the few hundred bytes a round that a ledger is there for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from mpc_fl.apps.runs.launcher import launch
from mpc_fl.config.config import parse_config, party_names

pytestmark = [pytest.mark.processes, pytest.mark.slow]
EARLY, LATE, NEVER = 20, 200, 400  # rounds; the run is ended after LATE, so that all parties are there to be looked at
SETTINGS: dict[str, Any] = {
    "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
    "model": {"architecture": "mlp", "hidden": [4]},
    "training": {"rounds": NEVER, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "loop"},
    "privacy": {"noise_multiplier": 2.0, "delta": 1e-3, "epsilon": 500.0},
    "federation": {"hospitals": 3},
}
PER_ROUND = 500  # bytes of a checkpoint or log: the records of the privacy ledger, one line


class _EnoughError(Exception):
    pass


def test_memory_logs_and_checkpoints_after_twenty_rounds_and_two_hundred(tmp_path: Path) -> None:
    config = parse_config(SETTINGS, "test")
    names, resident = party_names(config), dict[int, dict[str, int]]()

    def progress(party: str, phase: str, done: int, _total: int) -> None:
        if (party, phase) != ("aggregator", "aggregation") or done not in (EARLY, LATE):
            return
        children = psutil.Process().children(recursive=True)
        resident[done] = {child.name(): child.memory_info().rss for child in children if child.name() in names}
        if done == LATE:
            raise _EnoughError

    with pytest.raises(_EnoughError):
        launch(config, tmp_path, progress)
    assert sorted(resident[EARLY]) == sorted(resident[LATE]) == sorted(names)
    grown = {name: resident[LATE][name] / resident[EARLY][name] for name in names}
    assert max(grown.values()) < 1.05, grown
    for name in names:
        checkpoints = list((tmp_path / "parties" / name).glob("checkpoint-*"))
        assert 1 <= len(checkpoints) <= 3  # the last, the one before, and one that is being written
        kept = [*checkpoints, tmp_path / "logs" / f"{name}.log"]
        assert all(path.stat().st_size < 10_000 + LATE * PER_ROUND for path in kept)
