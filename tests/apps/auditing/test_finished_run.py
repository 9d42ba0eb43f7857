"""A run that was made, audited from its directory: its own noise and bounds, and its own data for shadow runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mpc_fl.apps.auditing.finished_run import AuditRequest, audit_run, run_to_audit
from mpc_fl.apps.simulation import simulation
from mpc_fl.apps.simulation.simulation import simulate
from mpc_fl.config.config import parse_config
from tests.support.auditing import same_seeds
from tests.support.groups_here import placed_here


@pytest.mark.parametrize("mechanism", ["local", "distributed"])
def test_a_run_is_audited_as_it_was_made(mechanism: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same_seeds(monkeypatch)
    monkeypatch.setattr(simulation, "set_up_log", lambda path: None)
    torch.set_num_threads(1)
    config = parse_config(
        {
            "task": "simulate",
            "data": {"image_size": 16, "phantoms": {"train_patients": 240, "test_patients": 30}},
            "model": {"architecture": "linear"},
            "training": {"rounds": 2, "local_steps": 2, "batch_size": 30, "per_sample_gradients": "hooks"},
            "privacy": {"mechanism": mechanism, "epsilon": 6.0, "delta": 1e-3},
        },
        "test",
    )
    (tmp_path / "ledgers").mkdir()
    made = simulate(config, tmp_path / "run", "mpc-fl simulate", lambda *_: None, placed_here(tmp_path / "ledgers"))
    run = run_to_audit(tmp_path / "run", 100)
    assert run.noise_multiplier == min(spent.noise_multiplier or 0.0 for spent in made.privacy)
    request = AuditRequest(tmp_path / "run", 400, 200, True, 4, "mpc-fl audit")
    found = audit_run(request, tmp_path / "audit", lambda *_: None)
    assert found.holds and found.canaries == 400 and found.delta == pytest.approx(0.2 / 400)
    assert (
        found.sample_rate == pytest.approx(30 / 80)
        and found.rounds == 2
        and found.honest == (1 if mechanism == "local" else 2)
    )
    # At its own delta the run says more than its steps, of which one round is spare, and less than its budget.
    spent = max(line.epsilon or 0.0 for line in made.privacy)
    assert found.epsilon_of_run == spent and found.upper[-1] == pytest.approx(spent, rel=0.3)
    assert found.membership is not None and (found.membership.models, found.membership.patients) == (4, 240)
    assert json.loads((tmp_path / "audit" / "audit.json").read_text())["holds"] is True
    assert "Area below the curve" in (tmp_path / "audit" / "report.html").read_text()
