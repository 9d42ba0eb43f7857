"""examples/case_study: what it plans can be run, it goes on where it was, its article says what was found and what is lacking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(
    0, str(REPOSITORY / "examples")
)  # the folder `examples` itself is no package: one of CrypTen's is called so

from case_study import figures, films, runner  # noqa: E402
from case_study.article import article_of  # noqa: E402
from case_study.figures import Comparison, Findings, PeersFound, Row, RunFound, collect  # noqa: E402
from case_study.paper import as_html, as_markdown, write_markdown  # noqa: E402
from case_study.runner import Record, chosen, digests, read_record, run_all  # noqa: E402
from case_study.steps import Step, Study, plan  # noqa: E402

from mpc_fl.apps.audit_summary import AuditSummary, BoundFound, MembershipFound  # noqa: E402
from mpc_fl.apps.rows import GlobalRound, OwnModel  # noqa: E402
from mpc_fl.apps.scores import Scores  # noqa: E402
from mpc_fl.config.loading import load_config  # noqa: E402
from mpc_fl.errors import DataError  # noqa: E402
from mpc_fl.evidence import models_compared  # noqa: E402
from mpc_fl.evidence.models_compared import FIGURES  # noqa: E402
from mpc_fl.evidence.shortcuts_tested import Estimate  # noqa: E402

# ---- the plan ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return films.write_phantoms(tmp_path_factory.mktemp("case-study") / "phantoms")


def settings_of(step: Step) -> list[str]:
    return [word for before, word in zip(step.command, step.command[1:], strict=False) if before == "--set"]


@pytest.mark.parametrize("quick", [True, False])
def test_every_step_has_settings_that_can_be(phantoms: Path, tmp_path: Path, quick: bool) -> None:
    steps = plan(Study(phantoms, tmp_path, quick, synthetic=True))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for number, step in enumerate(steps):
        assert set(step.needs) <= set(names[:number]) and step.result.is_relative_to(tmp_path), step.name
        configs = [word for word in step.command if word.endswith(".yaml")]
        more = ["federation.coordinator=none"] if step.name == "peers" else []
        for config in configs:
            load_config(Path(config), [*settings_of(step), *more])  # raises where settings contradict each other
        program = step.command[0]
        assert program == "mpc-fl" or (REPOSITORY / program).exists(), step.name
    assert quick or sum(step.minutes for step in steps) <= 110


def test_each_film_goes_to_one_hospital(phantoms: Path, tmp_path: Path) -> None:
    sites = films.divide(phantoms, tmp_path / "sites", 5)
    given = [path.relative_to(phantoms).as_posix() for path in films.listed(phantoms)]
    found = [path.relative_to(sites).parts for path in sites.glob("hospital-*/*/*/*.png")]
    assert sorted("/".join(parts[1:]) for parts in found) == sorted(given)
    hospital_of: dict[str, str] = {}
    for hospital, *_, name in found:
        assert hospital_of.setdefault(name.split("_")[0], hospital) == hospital
    assert len(set(hospital_of.values())) == 5


def test_a_class_without_films_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train/normal holds no film"):
        films.listed(tmp_path)


# ---- running -----------------------------------------------------------------------------------------------------------

PROGRAM = """
import pathlib, sys, time
log, result, word = sys.argv[1:4]
with open(log, "a") as file: file.write(word + "\\n")
if word == "sleeps": time.sleep(600)
if word == "fails": sys.exit("out of films")
pathlib.Path(result).parent.mkdir(parents=True)
pathlib.Path(result).write_text(word)
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    for split in films.SPLITS:
        for name in films.CLASSES:
            place = tmp_path / "data" / split / name / "person1_1.png"
            place.parent.mkdir(parents=True)
            place.write_bytes(b"film")
    (tmp_path / "program.py").write_text(PROGRAM)
    return Study(tmp_path / "data", tmp_path / "out")


def harmless(study: Study, name: str, word: str, *needs: str, minutes: float = 1.0) -> Step:
    result, root = study.run(name) / "result", study.out.parent
    command = (str(root / "program.py"), str(root / f"{name}.log"), str(result), word)
    return Step(name, "nothing much", command, result, minutes, needs)


def outcomes(study: Study, steps: list[Step], minutes: float = 60.0) -> dict[str, Record]:
    return run_all(study, steps, minutes, lambda _text: None, digests(study, steps))


def begun(study: Study, name: str) -> int:
    log = study.out.parent / f"{name}.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_what_is_there_is_not_made_again_unless_something_changed(study: Study) -> None:
    steps = [harmless(study, "first", "one"), harmless(study, "second", "two", "first")]
    for _ in range(2):
        assert [of.outcome for of in outcomes(study, steps).values()] == ["done", "done"]
    assert (begun(study, "first"), begun(study, "second")) == (1, 1)
    outcomes(study, [harmless(study, "first", "other"), steps[1]])  # what rests on it is made again, too
    assert (begun(study, "first"), begun(study, "second")) == (2, 2)
    (study.data / "train" / "viral" / "person2_1.png").write_bytes(b"another film")
    outcomes(study, [harmless(study, "first", "other"), steps[1]])
    assert (begun(study, "first"), begun(study, "second")) == (3, 3)


def test_an_interrupted_study_goes_on(study: Study) -> None:
    steps = [harmless(study, "first", "one"), harmless(study, "second", "two")]
    outcomes(study, steps)
    runner.record_file(study, "second").write_text('{"name": "sec')  # the machine went down
    assert read_record(study, steps[1]).outcome == "not run"
    assert [of.outcome for of in outcomes(study, steps).values()] == ["done", "done"]
    assert (begun(study, "first"), begun(study, "second")) == (1, 2)
    steps[0].result.unlink()  # a result that somebody removed is made again
    outcomes(study, steps)
    assert (begun(study, "first"), begun(study, "second")) == (2, 2)


def test_a_step_that_fails_stops_only_what_needs_it(study: Study) -> None:
    steps = [harmless(study, "bad", "fails"), harmless(study, "after", "one", "bad"), harmless(study, "beside", "two")]
    found = outcomes(study, steps)
    assert {name: of.outcome for name, of in found.items()} == {"bad": "failed", "after": "left out", "beside": "done"}
    assert found["bad"].status == 1 and "out of films" in found["bad"].said and "needs bad" in found["after"].said
    assert begun(study, "after") == 0
    article = as_html(article_of(collect(study, found)))
    assert "out of films" in article and "2 of 3 steps have no result" in article
    outcomes(study, steps)
    assert begun(study, "bad") == 2  # it is tried again


def test_a_step_that_does_not_end_is_ended(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_FEWEST_SECONDS", 2.0)
    monkeypatch.setattr(runner, "_TIMES", 0.0)
    found = outcomes(study, [harmless(study, "long", "sleeps")])
    assert found["long"].outcome == "failed" and found["long"].status is None and "deadline" in found["long"].said


def test_a_step_that_would_end_too_late_is_left_out(study: Study) -> None:
    found = outcomes(study, [harmless(study, "long", "one", minutes=90), harmless(study, "short", "two")], 60)
    assert found["long"].outcome == "left out" and found["short"].outcome == "done"


def test_steps_are_chosen_with_what_they_need(study: Study) -> None:
    steps = [harmless(study, "a", "1"), harmless(study, "b", "2", "a"), harmless(study, "c", "3")]
    assert [step.name for step in chosen(steps, ["b"])] == ["a", "b"]
    assert chosen(steps, []) == steps
    with pytest.raises(DataError, match="no step 'd'"):
        chosen(steps, ["d"])


# ---- results and article -----------------------------------------------------------------------------------------------


def estimate(value: float, reach: float = 0.05) -> Estimate:
    return Estimate(value, value - reach, value + reach)


def row(features: str, name: str, epsilon: float | None, accuracy: float) -> Row:
    values = {figure: estimate(accuracy) for figure in FIGURES}
    return Row(features, name, epsilon, 3, epsilon, 12.0, values)


def scores(accuracy: float) -> Scores:
    right = round(100 * accuracy)
    confusion = [[right, 100 - right], [0, 0]]
    return Scores(
        records=100, accuracy=accuracy, accuracy_low=accuracy - 0.08, accuracy_high=accuracy + 0.07,
        balanced_accuracy=accuracy, confusion=confusion,
    )  # fmt: skip


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    rows = [row("lite0", "alone", 8.0, 0.6123), row("lite0", "distributed", 8.0, 0.7654)]
    table = figures.AccuracyTable("command", figures.Truth([0], [0]), rows, [])
    run = dict.fromkeys(("epsilon", "accuracy", "accuracy_low", "accuracy_high", "auc_macro"))
    run |= {
        "accuracy": 0.7311,
        "accuracy_low": 0.68,
        "accuracy_high": 0.78,
        "mechanism": "none",
        "parameters": 3843,
        "seconds": 61,
    }
    own = OwnModel(scores(0.71), scores(0.74), 3, 6, 0.51)
    audit = AuditSummary(
        name="x", run="x", synthetic=False, command="x", versions={}, mechanism="distributed", unit="patient", hospitals=3,
        honest=3, rounds=2, local_steps=2, sample_rate=0.5, noise_multiplier=0.4, delta=1e-5, confidence=0.95, canaries=4000,
        repetitions=4, bounds=[BoundFound("all releases", 2, 9.5, 8.0, 100, 99)], upper=[7.0, 8.0], epsilon_of_run=8.0, seconds=1.0,
        membership=MembershipFound(8, 2619, 0.5678, [(0.01, 0.02)], [(0.01, 0.02), (1.0, 1.0)]),
    )  # fmt: skip
    hospitals = [f"hospital-{number}" for number in range(5)]
    rounds = [GlobalRound(1, scores(0.5), hospitals[:4]), GlobalRound(2, scores(0.66), hospitals)]
    peers = PeersFound(hospitals, hospitals[4], hospitals[1], {hospitals[4]: "round 2"}, {}, True, 5, {}, rounds)
    return Findings(
        study=Study(tmp_path, tmp_path),
        records={"small-table": Record("small-table", "failed", "a command", said="no space <left>")},
        tables={"lite0": table},
        comparisons=[Comparison("lite0", "federated", "alone", 8.0, estimate(0.0213), estimate(0.01))],
        runs={"head-sums": RunFound(run, 123456.0, {"hospital-2": own})},
        audits={"membership-distributed": audit},
        peers=peers,
    )


def test_figures_in_the_article_are_those_that_were_found(findings: Findings) -> None:
    text = as_markdown(article_of(findings), "study")
    for figure in (
        "76.5 % (71.5 to 81.5)",
        "61.2 % (56.2 to 66.2)",
        "73.1 %",
        "123 kB",
        "0.568",
        "+2.1 points (-2.9 to +7.1)",
    ):
        assert figure in text, figure
    assert "hospital-4 was started while the others trained and took part in rounds 2" in text
    assert "66.0 %" in text and "![" in text


def test_what_went_against_hopes_is_said(findings: Findings) -> None:
    negative = article_of(findings).sections["Negative results"]
    text = " ".join(block.line for block in negative)  # type: ignore[union-attr]
    assert "that federated is better than alone was not shown" in text
    assert "hospital-2's own model is better on its own test films (74.0 % beside 71.0 %" in text
    assert "membership-distributed: a lower bound on epsilon exceeds the promise." in text
    assert "The step small-table has no result: no space <left>" in text
    better = [replace(of, accuracy=estimate(0.2)) for of in findings.comparisons]
    good = replace(findings, comparisons=better, runs={}, audits={}, records={})
    (only,) = article_of(good).sections["Negative results"]
    assert "None of the comparisons" in only.words  # type: ignore[union-attr]


def test_the_page_is_one_file_in_which_nothing_is_markup(findings: Findings, tmp_path: Path) -> None:
    page = as_html(article_of(findings))
    assert "no space &lt;left&gt;" in page and "<left>" not in page
    assert 'src="http' not in page and "data:image/svg+xml" in page and "SYNTHETIC" not in page
    quick = replace(findings, study=replace(findings.study, quick=True, synthetic=True))
    page = as_html(article_of(quick))
    assert "SYNTHETIC" in page and "QUICK TRY" in page and "phantoms: figures say that the study runs" in page
    write_markdown(article_of(findings), tmp_path / "study.md")
    text = (tmp_path / "study.md").read_text()
    for picture in tmp_path.glob("study-*.svg"):
        assert picture.name in text and picture.read_text().startswith("<?xml")
    assert text.count("![") == len(list(tmp_path.glob("study-*.svg"))) >= 3


def test_an_article_of_nothing_says_that_all_is_lacking(tmp_path: Path) -> None:
    study = Study(tmp_path, tmp_path)
    article = article_of(collect(study, {"peers": Record("peers", "not run", "a command")}))
    assert article.remark == "1 of 1 steps have no result" and "Attacks" not in article.sections


def written_table(study: Study, skill: dict[str, float]) -> None:
    """A table.json of one epsilon, two seeds, whose rows know the class so well."""
    draw, labels = np.random.default_rng(0), [number % 3 for number in range(60)]
    results, table = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, known in skill.items():
        for seed in (0, 1):
            said = draw.random((1, 60, 3)) + known * np.eye(3)[labels]
            of = {"features": "lite0", "row": name, "epsilon": 8.0, "seed": seed, "spent": 7.0, "seconds": 1.0}
            results.append({**of, "probabilities": (said / said.sum(axis=2, keepdims=True)).tolist()})
        figure = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in FIGURES}
        of = {"features": "lite0", "row": name, "epsilon": 8.0, "seeds": 2, "spent": 7.0, "seconds": 1.0}
        table.append({**of, "figures": figure})
    place = study.run("head-table") / "table.json"
    place.parent.mkdir(parents=True)
    truth = {"labels": labels, "patients": list(range(60))}
    place.write_text(json.dumps({"command": "c", "versions": {}, "test": truth, "table": table, "results": results}))


def test_comparisons_are_those_of_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_compared, "_RESAMPLES", 100)
    study = Study(tmp_path, tmp_path)
    written_table(study, {"alone": 0.1, "central": 5.0, "distributed": 5.0})
    found = collect(study, {"head-table": Record("head-table", "done", "c"), "views": Record("views", "done", "c")})
    by_second = {of.second: of for of in found.comparisons}
    assert by_second.keys() == {"alone", "central"}
    assert by_second["alone"].accuracy.low > 0.2 and by_second["alone"].shown
    assert by_second["central"].accuracy == Estimate(0, 0, 0) and not by_second["central"].shown
    assert "views" in found.damaged and "views" in found.lacking  # its file is missing
    text = as_markdown(article_of(found), "study")
    assert "EfficientNet-Lite0" in text and "The step views has no result" in text


# ---- the whole ---------------------------------------------------------------------------------------------------------


def case_study(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "examples" / "case_study", *map(str, arguments)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700, check=False)


def test_films_must_be_given(tmp_path: Path) -> None:
    done = case_study("--out", tmp_path / "out")
    assert (
        done.returncode == 1
        and "no films were given: pass --data DIR" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
def test_a_quick_study_on_phantoms_goes_from_films_to_an_article(tmp_path: Path) -> None:
    wanted = ("--quick", "--out", tmp_path / "out", "--only", "check", "head-table", "diagnosis-head", "peers")
    done = case_study(*wanted, "--markdown", tmp_path / "study.md")
    assert done.returncode == 0, done.stderr[-3000:]
    text, page = (tmp_path / "study.md").read_text(), (tmp_path / "out" / "report.html").read_text()
    for title in ("Abstract", "Accuracy and privacy", "Real federations", "Encrypted diagnosis", "joining and leaving"):
        assert title in text and title in page
    membership = json.loads((tmp_path / "out" / "runs" / "peers" / "membership.json").read_text())
    assert membership["one_model"] and list(membership["left"]) == ["hospital-1"]
    again = case_study(*wanted)
    assert again.returncode == 0 and again.stderr.count("is there already") == 5, again.stderr[-3000:]
