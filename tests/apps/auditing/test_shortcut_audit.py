"""Shortcuts found in models that are made by hand, and in what hospitals learn from marked phantoms, alone and together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mpc_fl.apps.auditing.shortcut_audit import ShortcutRequest, audit_shortcuts, probe_sites, study
from mpc_fl.apps.auditing.shortcut_configs import run_again_config
from mpc_fl.apps.auditing.shortcut_runs import (
    JudgingModel,
    films_of_sites,
    model_of_run,
    together,
    train_again,
    train_alone,
)
from mpc_fl.apps.shortcut_summary import SHORTCUTS_FILE, ShortcutSummary
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.evidence.shortcuts_tested import Changed
from mpc_fl.learning.data.phantoms import make_phantoms
from mpc_fl.parsing import parse_json
from tests.support.shortcuts import finished_run, hospitals_own_run, reads_the_mark, small_run


def found_in(model: torch.nn.Module, site: int) -> dict[str, Changed]:
    config = small_run()
    (films,) = [own for own in films_of_sites(config, ["test"]) if own.rank == site]
    return {one.name: one for one in study(JudgingModel(model, config), films.test, films.lungs)[1]}


def test_a_model_that_reads_the_mark_is_found() -> None:
    at_marked = found_in(reads_the_mark(small_run()), 0)
    assert at_marked["lungs masked"].finding == "shortcut" and at_marked["lungs masked"].kept > 0.8
    assert at_marked["corners replaced"].finding == "shortcut"
    assert at_marked["corners replaced"].accuracy_change.high < -0.1 and at_marked["corners replaced"].p_holm < 0.01
    elsewhere = found_in(reads_the_mark(small_run()), 1)
    assert elsewhere["corners replaced"].finding == "none" == elsewhere["lungs masked"].finding


def test_a_model_that_reads_the_lungs_is_not_blamed() -> None:
    # Light in the lungs is the mark of the disease here, as far as a film's own exposure lets it.
    config = small_run()
    model, size = reads_the_mark(config), config.data.image_size
    middle = torch.from_numpy(make_phantoms(20, 3, size, 0, "train").lungs).float().mean(dim=0).flatten()
    with torch.no_grad():
        weights = next(iter(model.parameters()))
        weights.zero_()
        weights[1] = 4 * middle / middle.sum() - 4 * (1 - middle) / (1 - middle).sum()
    found = found_in(model, 0)
    change = found["lungs masked"]
    assert change.area.value - change.area_change.value > 0.6  # it is no blind model
    assert found["corners replaced"].finding == "none" and found["lungs masked"].finding == "none"


def test_lungs_of_phantoms_are_their_own() -> None:
    config = small_run()
    sites = films_of_sites(config, ["test"])
    drawn = make_phantoms(180, 3, 16, config.seed, "test")
    for site in sites:
        rows = [int(name.rpartition("-")[2]) for name in site.test.names]
        assert torch.equal(site.lungs, torch.from_numpy(drawn.lungs[rows]))
    whole = together([site.test for site in sites])
    assert whole.patient_count == 180 and len(whole) == len(drawn.labels)


def test_a_run_is_audited_and_reported(tmp_path: Path) -> None:
    config = small_run()
    run, told = finished_run(tmp_path / "run", config, reads_the_mark(config)), list[str]()
    request = ShortcutRequest(run, False, False, False, "mpc-fl audit shortcuts <b>")
    summary = audit_shortcuts(request, tmp_path / "audit", lambda party, phase, done, of: told.append(phase))
    assert summary.probe is None and summary.left_out == [] and set(told) == {"films", "changed films"}
    assert [(of.model, of.site) for of in summary.models] == [
        ("federation", site) for site in (None, "hospital-0", "hospital-1", "hospital-2")
    ]
    assert "lungs masked" in summary.shortcuts and summary.mark is not None
    written = (tmp_path / "audit" / SHORTCUTS_FILE).read_text()
    assert ShortcutSummary.from_json(parse_json(written)) == summary
    report = (tmp_path / "audit" / "report.html").read_text()
    assert (
        "shows a shortcut" in report
        and report.count("data:image/png") == 3 * 8
        and "<b>" not in report.split("<pre>")[1]
    )
    assert "data:image/svg+xml" in report and "http" not in report.replace("http-equiv", "")
    with pytest.raises(ConfigError, match="exists already"):
        audit_shortcuts(request, tmp_path / "audit", lambda *_: None)


def test_a_hospital_audits_with_its_own_films(tmp_path: Path) -> None:
    run, films = hospitals_own_run(tmp_path / "run", tmp_path / "films"), tmp_path / "films"
    whole = ShortcutRequest(run, True, False, False, "", films)
    with pytest.raises(ConfigError, match="the films of hospital-1 alone are here.*--no-probe --no-left-out"):
        audit_shortcuts(whole, tmp_path / "audit", lambda *_: None)
    request = replace(whole, probe=False)
    summary = audit_shortcuts(request, tmp_path / "audit", lambda *_: None)
    assert summary.films_of == "hospital-1" and len(summary.models) == 1 and "fixed" in summary.lungs
    assert summary.models[0].accuracy.value == 1.0 and summary.shortcuts == [
        "lungs masked",
        "borders replaced",
        "corners replaced",
    ]
    report = (tmp_path / "audit" / "report.html").read_text()
    assert "data:image/png" not in report and "No film is shown" in report  # these are patients
    audit_shortcuts(replace(request, pictures=True), tmp_path / "shown", lambda *_: None)
    assert (tmp_path / "shown" / "report.html").read_text().count("data:image/png") == 2 * 8
    empty = tmp_path / "empty"
    for name in ("normal", "bacterial"):
        (empty / "test" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="hospital-1 has no test films here"):
        audit_shortcuts(replace(request, data=empty), tmp_path / "none", lambda *_: None)
    of_aggregator = hospitals_own_run(tmp_path / "other", tmp_path / "films of other", "aggregator")
    with pytest.raises(DataError, match="aggregator, which has no films"):
        audit_shortcuts(replace(request, run=of_aggregator), tmp_path / "third", lambda *_: None)


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a finished run"):
        audit_shortcuts(ShortcutRequest(tmp_path, False, False, False, ""), tmp_path / "audit", lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["none", "local", "distributed"])
def test_all_trainings_of_an_audit(mechanism: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = small_run(mechanism, style=1.0)
    run, told = finished_run(tmp_path / "run", config, reads_the_mark(config)), set[str]()
    request = ShortcutRequest(run, True, True, False, "mpc-fl audit shortcuts")
    summary = audit_shortcuts(request, tmp_path / "audit", lambda party, phase, done, of: told.add(phase))
    assert told == {"films", "probe of sites", "alone", "without each site", "changed films"}
    assert summary.probe is not None and summary.probe.steps == 4 and summary.probe.mechanism == mechanism
    spent = summary.probe.epsilon
    assert (spent is None) if mechanism == "none" else (spent is not None and 0 < spent <= 8.0)
    assert [of.site for of in summary.left_out] == ["hospital-0", "hospital-1", "hospital-2"]
    assert all(of.without is not None and of.patients == 60 for of in summary.left_out)
    assert sum(of.model == "alone" for of in summary.models) == 3
    report = (tmp_path / "audit" / "report.html").read_text()
    assert "Untouched: hospital-0 alone" in report and "Nothing was charged" in report


@pytest.mark.long
def test_one_hospital_alone_learns_the_mark_and_the_federation_less(tmp_path: Path) -> None:
    """The demonstration without data, as its report says it; without noise, so that few phantoms are enough."""
    torch.set_num_threads(1)
    config = small_run(probability=0.95, style=0.5).with_values(
        data={
            "phantoms": {
                "train_patients": 900,
                "test_patients": 450,
                "shortcut": {"site": 0, "probability": 0.95, "style": 0.5},
            }
        },
        model={"architecture": "small_cnn"},
        training={"rounds": 30, "local_steps": 5, "batch_size": 60, "learning_rate": 0.02, "gradient_clipping": 1.0},
    )
    sites = films_of_sites(config, ["train", "test"])
    federation = train_again(run_again_config, config, [site.parts for site in sites], lambda *_: None).model
    alone = train_alone(config, sites[0], lambda *_: None)

    def corners(model: JudgingModel) -> Changed:
        return next(one for one in study(model, sites[0].test, sites[0].lungs)[1] if one.name == "corners replaced")

    own, common = corners(alone), corners(federation)
    assert own.beyond_seams is not None and common.beyond_seams is not None and own.finding == "shortcut"
    assert own.beyond_seams.value < -0.2 and common.beyond_seams.value > own.beyond_seams.value / 2
    probe = probe_sites(config, sites, lambda *_: None)
    assert probe.told and probe.accuracy.low > 0.5


def test_the_model_of_a_run_is_read_from_its_file(tmp_path: Path) -> None:
    config = small_run()
    run = finished_run(tmp_path / "run", config, reads_the_mark(config))
    model, films = model_of_run(run / MODEL_FILE, config), films_of_sites(config, ["test"])[0].test
    expected = JudgingModel(reads_the_mark(config).eval(), config).answers(films)
    assert torch.equal(model.answers(films).logits, expected.logits)
