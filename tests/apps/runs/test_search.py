"""A search over settings: which are refused, that it is one budget, and that it goes on where it was ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.apps.cli import main
from mpc_fl.apps.cli.options import begin_on_ledgers
from mpc_fl.apps.report.search_page import write_search_report
from mpc_fl.apps.runs.search import _epsilons, _Plan, _spent, grid_of, grid_setting, ledger_forecasts, searched
from mpc_fl.apps.search_summary import SEARCH_FILE, SearchSummary, TrialResult, best_trial
from mpc_fl.audit.model_origin import model_origin
from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import ConfigError, PrivacyBudgetError
from mpc_fl.federation.ledger_forecast import LedgerForecast
from mpc_fl.federation.planning import budget_of
from mpc_fl.learning.privacy.accounting import SubsampledGaussian, calibrate_noise_multiplier
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.roles import hospital_names

SECTIONS: dict[str, Any] = {
    "data": {"image_size": 8, "validation_fraction": 0.3, "phantoms": {"train_patients": 60, "test_patients": 20}},
    "model": {"architecture": "mlp", "hidden": [2]},
    "training": {"rounds": 2, "local_steps": 1, "batch_size": 4, "per_sample_gradients": "vmap"},
    "privacy": {"epsilon": 20.0, "delta": 1e-3},
    "evaluation": {"noise_multiplier": 8.0, "choose": "best", "calibrate": "both"},
    "federation": {"hospitals": 2},
}

QUIET: dict[str, Any] = {"privacy": {"epsilon": 4.0, "accountant": "rdp"}, "evaluation": {"noise_multiplier": 200.0}}


def configured(**sections: Any) -> Config:
    return parse_config({**SECTIONS, **{name: {**SECTIONS[name], **of} for name, of in sections.items()}}, "test")


def test_every_combination_is_tried() -> None:
    search = searched(configured(), {"training.learning_rate": [0.1, 0.2], "model.hidden": [[2], [4], [2, 2]]})
    assert len(search.settings) == 6
    trial = search.trial(6, 2.5, Path("/somewhere"))
    assert (trial.training.learning_rate, trial.model.hidden) == (0.2, (2, 2))
    assert not trial.evaluation.test and trial.privacy.noise_multiplier == 2.5 and trial.name == "phantoms trial 6"
    last = search.last(6, 3.0, Path("/somewhere"))
    assert last.evaluation.test and last.privacy.noise_multiplier == 3.0 and last.name == "phantoms"
    assert last.training == trial.training and last.site.privacy_ledger == Path("/somewhere")


@pytest.mark.parametrize(
    ("sections", "grid", "words"),
    [
        (
            {"data": {"validation_fraction": 0.0}, "evaluation": {"choose": "last", "calibrate": "none"}},
            {"training.rounds": [1, 2]},
            "there are none",
        ),
        ({"privacy": {"noise_multiplier": 3.0}}, {"training.rounds": [1, 2]}, "follows from the budget"),
        ({}, {"privacy.epsilon": [1, 2]}, "cannot be searched"),
        ({}, {"data.classes": [["a", "b"], ["c", "d"]]}, "cannot be searched"),
        ({}, {"training.rounds": []}, "has no values"),
        ({}, {"training.rounds": [3]}, "at least two"),
        ({}, {"training.rounds": [3, 3]}, "at least two"),
        ({}, {"training.rounds": list(range(1, 300))}, "are more than"),
    ],
)
def test_what_cannot_be_searched_is_refused(sections: Any, grid: dict[str, list[Any]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        searched(configured(**sections), grid)


def test_values_are_read_as_yaml() -> None:
    assert grid_setting("training.learning_rate=0.1, 1") == ("training.learning_rate", [0.1, 1])
    assert grid_setting("model.hidden=[2],[4, 4]") == ("model.hidden", [[2], [4, 4]])
    for text in ("training.rounds", "=3,4"):
        with pytest.raises(ConfigError, match="not of the form"):
            grid_setting(text)
    assert grid_of({"training.rounds": [1, 2]}, "grid.yaml") == {"training.rounds": [1, 2]}
    for wrong in (None, [1], {"training.rounds": 3}):
        with pytest.raises(ConfigError, match="no lists of values"):
            grid_of(wrong, "grid.yaml")


def test_what_trials_spent_per_image_is_counted_per_image(tmp_path: Path) -> None:
    """Read as if it were per patient, it could certify nothing: the search would end after all trials were charged."""
    event = SubsampledGaussian(2.0, 0.1, 10)
    names = hospital_names(3)
    for name in names:
        PrivacyLedger(tmp_path / f"{name}-privacy.sqlite3", name, "image").charge(event, run="trial 1", round_number=1)
    changes = {
        "data": {"source": "images", "unit": "image"},
        "privacy": {"mechanism": "local", "smallest_hospital": 100},
    }
    config = parse_config({**changes, "federation": {"hospitals": 3}}, "test")
    assert _spent(config, tmp_path) == [[event]] * 3
    assert all(epsilon is not None and epsilon > 0 for epsilon in _epsilons(config, tmp_path).values())


def test_a_search_says_what_its_privacy_ledgers_leave_for_it(tmp_path: Path) -> None:
    config = configured(**QUIET).with_values(site={"privacy_ledger": str(tmp_path)})
    search = searched(config, {"training.learning_rate": [0.1, 0.2]})
    assert ledger_forecasts(search) == [] and not list(tmp_path.iterdir())  # nothing is spent, and no ledger is made
    budget = budget_of(config)
    noise = calibrate_noise_multiplier(budget, 0.1, 10, [], "an earlier run")
    ledger = PrivacyLedger(tmp_path / "hospital-1-privacy.sqlite3", "hospital-1", "patient")
    ledger.charge(SubsampledGaussian(1.02 * noise, 0.1, 10), run="earlier", round_number=1, budget=budget)
    (forecast,) = ledger_forecasts(search)
    assert forecast.hospital == "hospital-1" and forecast.target == 4.0
    assert 3 < forecast.used < 4 and forecast.used == ledger.epsilon(budget.delta, budget.accountant)
    # What is said is the noise that the trials will have.
    assert forecast.noise_multiplier == _Plan.of(search, tmp_path, tmp_path, False).noise and 1.9 < forecast.times < 2
    without = config.with_values(privacy={"mechanism": "none"}, evaluation={"noise_multiplier": None})
    assert ledger_forecasts(searched(without, {"training.learning_rate": [0.1, 0.2]})) == []


def test_a_search_on_ledgers_that_are_nearly_spent_asks_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(**QUIET)
    budget = budget_of(config)
    noise = calibrate_noise_multiplier(budget, 0.1, 10, [], "an earlier run")
    ledger = PrivacyLedger(tmp_path / "ledgers" / "hospital-0-privacy.sqlite3", "hospital-0", "patient")
    ledger.path.parent.mkdir()
    ledger.charge(SubsampledGaussian(1.001 * noise, 0.1, 10), run="earlier", round_number=1, budget=budget)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [
        "tune",
        tmp_path / "config.yaml",
        "--try",
        "training.learning_rate=0.1,0.2",
        "--ledger",
        ledger.path.parent,
    ]
    monkeypatch.setattr(sys, "argv", ["mpc-fl", *map(str, command), "--out", str(tmp_path / "search")])
    with pytest.raises(SystemExit) as ended:
        main.main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == PrivacyBudgetError.exit_code and "times as much: say --anyway" in said, said
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("search")]


def test_what_ledgers_leave_is_said_beside_json(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json nothing was said, before or after."""
    little, much = (
        LedgerForecast(f"hospital-{rank}", 4.7, 8.0, noise, 1.46) for rank, noise in enumerate((1.84, 24.9))
    )
    names = Config().federation.chosen_names
    assert begin_on_ledgers([little], names, False, True) == [little.to_json()]
    said, beside = capsys.readouterr()
    assert said == "" and "epsilon 4.7 of 8 is used, 3.3 is left; the noise multiplier is 1.84" in " ".join(
        beside.split()
    )
    with pytest.raises(PrivacyBudgetError, match="say --anyway"):
        begin_on_ledgers([little, much], names, False, False)
    assert capsys.readouterr().out == ""
    assert len(begin_on_ledgers([little, much], names, True, False)) == 2
    assert capsys.readouterr().out.count("is left") == 2


def test_the_best_trial_is_the_first_of_the_best() -> None:
    trials = [TrialResult(n, {}, figure) for n, figure in ((1, 0.5), (2, 0.75), (3, 0.75), (4, None))]
    found = best_trial(trials)
    assert found is not None and found.number == 2
    assert best_trial([TrialResult(1, {}, failed="it went wrong")]) is None


def command(config: Path, out: Path, *more: str) -> list[str]:
    tries = ["--try", "training.learning_rate=0.1,0.5"]
    return [sys.executable, "-m", "mpc_fl", "tune", str(config), "--out", str(out), *tries, *more]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(SECTIONS))  # JSON is YAML
    return path


@pytest.mark.processes
@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_stays_within_its_budget(config_file: Path, tmp_path: Path) -> None:
    out, ledgers = tmp_path / "search", tmp_path / "ledgers"
    more = ["--ledger", str(ledgers)]
    first = subprocess.Popen(command(config_file, out, *more), stderr=subprocess.DEVNULL, start_new_session=True)
    done = tmp_path / "search.partial" / "trials" / "trial-1" / "summary.json"
    while not done.exists() and first.poll() is None:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not out.exists()
    again = subprocess.run(command(config_file, out, *more), capture_output=True, text=True, check=False)
    assert again.returncode != 0 and "exists" in again.stderr
    before = done.stat().st_mtime_ns
    subprocess.run(command(config_file, out, *more, "--resume"), check=True, capture_output=True)
    assert (out / "trials" / "trial-1" / "summary.json").stat().st_mtime_ns == before
    summary = SearchSummary.from_json(json.loads((out / SEARCH_FILE).read_text()))
    assert [trial.settings for trial in summary.trials] == [
        {"training.learning_rate": f"{rate}"} for rate in (0.1, 0.5)
    ]
    assert all(trial.figure is not None for trial in summary.trials) and summary.final is not None
    for spent in summary.spent:
        assert spent.after_trials is not None and spent.after_all is not None
        assert 0 < spent.after_trials < spent.after_all <= 20.0
        ledger = PrivacyLedger(ledgers / f"{spent.hospital}-privacy.sqlite3", spent.hospital)
        assert ledger.epsilon(1e-3) == spent.after_all
        runs = {" ".join(record["run"].split()[:3]) for record in ledger.records()}
        assert {"phantoms trial 1", "phantoms trial 2"} <= runs
    for number in (1, 2):  # test patients were left alone
        lines = (out / "trials" / f"trial-{number}" / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(line)["evaluation"] is None for line in lines)
    assert model_origin(out / "final" / "model.safetensors").signed and summary.calibration is not None
    final = json.loads((out / "final" / "summary.json").read_text())
    assert final["evaluated_round"] == 3 and final["chosen"]["round"] in (1, 2)
    page = write_search_report(out).read_text()
    assert "training.learning_rate=0.5" in page and "SYNTHETIC" in page and "<script" not in page
