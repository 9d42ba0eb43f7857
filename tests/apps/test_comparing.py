"""`mpc-fl compare` says what runs reached and where they differ, from their own files, and refuses what is no run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mpc_fl.apps.cli.comparison import compare
from mpc_fl.apps.comparing import differing_settings, read_run
from mpc_fl.apps.costs import Cost, PartyCosts
from mpc_fl.apps.scores import Scores
from mpc_fl.apps.summaries import PartySummary, PrivacySpent, TrainingSummary
from mpc_fl.config.config import Config, parse_config
from mpc_fl.errors import MpcFlError

app = typer.Typer()
app.command()(compare)


def _run(directory: Path, accuracy: float | None, config: Config, epsilon: float | None = 3.5) -> Path:
    directory.mkdir()
    scores = None
    if accuracy is not None:
        scores = Scores(
            records=300, accuracy=accuracy, accuracy_low=accuracy - 0.05, accuracy_high=accuracy + 0.05,
            balanced_accuracy=0.7, confusion=[[100, 50], [50, 100]], auc_macro=0.91,
        )  # fmt: skip
    spent = [
        PrivacySpent(f"hospital-{rank}", None if epsilon is None else epsilon + rank, 1e-5, 2.0, 8.0, "local")
        for rank in range(3)
    ]
    summary = TrainingSummary(
        name=config.name, synthetic=True, rounds=config.training.rounds, parameters=22499, seconds=12.3, command="mpc-fl",
        hospitals=["hospital-0", "hospital-1", "hospital-2"], versions={}, final=scores, privacy=spent,
    )  # fmt: skip
    (directory / "summary.json").write_text(json.dumps(summary.to_json()))
    (directory / "config.yaml").write_text(config.to_yaml())
    return directory


def test_runs_stand_side_by_side_with_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = _run(tmp_path / "one", 0.81, parse_config({"training": {"rounds": 3}}, "x"))
    two = _run(
        tmp_path / "two", None, parse_config({"name": "other", "federation": {"session": "s"}}, "x"), epsilon=None
    )
    runs = [read_run(one), read_run(two)]
    assert differing_settings(runs) == {"training.rounds": [3, 5]}
    figures = runs[0].figures()
    assert (figures["accuracy"], figures["epsilon"], figures["auc_macro"], figures["delta"]) == (0.81, 5.5, 0.91, 1e-5)
    assert (runs[1].figures()["accuracy"], runs[1].figures()["epsilon"]) == (None, None)
    shown = CliRunner().invoke(app, ["one", "two"])
    text = " ".join(shown.output.split())
    assert shown.exit_code == 0 and "81.0% (76.0% to 86.0%) of 300" in text and "training.rounds 3 5" in text
    printed = json.loads(CliRunner().invoke(app, [str(one), str(two), "--json"]).output)
    assert [run["rounds"] for run in printed["runs"]] == [3, 5] and printed["settings"] == {"training.rounds": [3, 5]}
    assert "No setting differs" in CliRunner().invoke(app, [str(one), str(one)]).output


def test_of_a_run_on_several_machines_each_party_says_what_it_has(tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", 0.81, parse_config({"training": {"rounds": 3}}, "x"))
    scores = TrainingSummary.from_json(json.loads((whole / "summary.json").read_text())).final
    common: dict[str, Any] = {
        "name": "x", "synthetic": False, "rounds": 3, "rounds_made": 3, "hospitals": 3, "parameters": 22499, "seconds": 5.0,
        "command": "mpc-fl", "versions": {}, "classes": ["a", "b"], "unit": "patient", "openings": 9,
    }  # fmt: skip
    own = PrivacySpent("hospital-1", 2.5, 1e-5, 2.0, 8.0, "local")
    parties = {
        "hospital-1": PartySummary(party="hospital-1", privacy=own, own_accuracy=0.7, records={"test": 10}, **common),
        "hospital-2": PartySummary(party="hospital-2", privacy=own, records={"test": 0}, **common),
        "aggregator": PartySummary(party="aggregator", final=scores, **common),
    }
    for name, summary in parties.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary.to_json()))
        site = {"site": {"data": f"/data/of/{name}"}, "training": {"rounds": 3}}
        (tmp_path / name / "config.yaml").write_text(parse_config(site, "x").to_yaml())
    runs = {name: read_run(tmp_path / name) for name in ("whole", *parties)}
    assert differing_settings(list(runs.values())) == {}
    figures = {name: run.figures() for name, run in runs.items()}
    keys = ("party", "accuracy", "own_accuracy", "own_test_records", "epsilon", "mechanism", "hospitals")
    assert {name: tuple(of[key] for key in keys) for name, of in figures.items()} == {
        "whole": (None, 0.81, None, None, 5.5, "local", 3),
        "hospital-1": ("hospital-1", None, 0.7, 10, 2.5, "local", 3),
        "hospital-2": ("hospital-2", None, None, 0, 2.5, "local", 3),
        "aggregator": ("aggregator", 0.81, None, None, None, None, 3),
    }
    output = CliRunner().invoke(app, [str(tmp_path / name) for name in runs]).output
    text = " ".join(output.split())
    assert "70.0% of 10" in text and "all" in text and " none " not in text  # nobody trained without privacy
    assert "Own accuracy" not in CliRunner().invoke(app, [str(whole)]).output


def test_the_price_of_privacy_stands_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config({}, "x")

    def with_costs(name: str, processor: float, epsilon: float | None, mechanism: str, central: bool = False) -> None:
        directory = _run(tmp_path / name, 0.8, config, epsilon)
        summary = TrainingSummary.from_json(json.loads((directory / "summary.json").read_text()))
        total = Cost(4.0, processor, None, 12 * processor, 0 if central else 5_000_000)
        spent = [replace(of, mechanism=mechanism) for of in summary.privacy]
        parties = ["central"] if central else ["hospital-0", "aggregator"]
        costs = {party: PartyCosts({"training": total}, total, "estimated", 0.1) for party in parties}
        changed = replace(summary, costs=costs, central=central, privacy=spent)
        (directory / "summary.json").write_text(json.dumps(changed.to_json()))

    with_costs("central", 10.0, None, "none", central=True)
    with_costs("sums", 15.0, None, "none")
    with_costs("noise", 40.0, 3.0, "distributed")
    output = CliRunner().invoke(app, ["central", "sums", "noise"]).output
    text = " ".join(output.split())
    assert "The price of privacy:" in text and "central: synthetic phantoms" in text
    assert "secure sums, distributed noise" in text
    assert "10 s not used" in text and "30 s (3.0 x central)" in text and "80 s (8.0 x central)" in text
    assert "10 MB 360 J estimated 0.2 g" in text
    printed = json.loads(CliRunner().invoke(app, ["central", "noise", "--json"]).output)["runs"]
    assert [run["processor_seconds"] for run in printed] == [10.0, 80.0] and printed[0]["central"]
    assert [run["joules"] for run in printed] == [120.0, 960.0] and printed[1]["energy"] == "estimated"
    before = _run(tmp_path / "before", 0.8, config)  # by a version that counted nothing of it
    assert "price of privacy" not in CliRunner().invoke(app, [str(before)]).output


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{}",
        b"[1]",
        b'{"kind": "infer"}',
        b'{"kind": "train"}',
        b'{"kind": "party"}',
        b'{"kind": []}',
        b"\xff",
        b"[" * 10_000,
    ],  # fmt: skip
)
def test_what_is_no_training_run_is_refused_in_one_line(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(MpcFlError) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_text_of_a_run_is_never_taken_for_markup(tmp_path: Path) -> None:
    values: dict[str, Any] = {"training": {"rounds": 4}, "data": {"classes": ["[red]a", "b"]}}
    one, two = _run(tmp_path / "[bold]one", 0.5, parse_config(values, "x")), _run(tmp_path / "two", 0.5, Config())
    output = CliRunner().invoke(app, [str(one), str(two)]).output
    assert "[red]a" in "".join(output.split()) and "[bold]one" in "".join(output.split())


def test_a_run_of_others_writes_nothing_to_the_terminal_but_text(tmp_path: Path) -> None:
    """Its settings and its directory moved the cursor, or ended the command as markup of tables."""
    one, two = (_run(tmp_path / name, 0.8, Config()) for name in ("[red]one[b]", "two"))
    (two / "config.yaml").write_text('"\\e[2Jkey": "\\e]0;title\\a[/b]"\n')
    shown = CliRunner().invoke(app, [str(one), str(two)])
    assert shown.exit_code == 0, shown.exception
    assert "\x1b" not in shown.output and "[red]one[b]" in shown.output.replace("\n", "") and "?[2Jkey" in shown.output


def _changed(run: Path, **fields: Any) -> Path:
    """The run with other values in its summary."""
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, **fields}))
    return run


def test_what_makes_figures_another_question_is_said_beside_them(tmp_path: Path) -> None:
    config = Config()
    plain = _changed(_run(tmp_path / "plain", 0.8, config), synthetic=False)
    simulated = _changed(
        _run(tmp_path / "many", 0.8, config), simulated=True, unit="image", evaluated_round=3,
        took_part={"4": ["hospital-0", "hospital-1"], "5": ["hospital-0", "hospital-1", "hospital-2"]},
    )  # fmt: skip
    figures = read_run(simulated).figures()
    keys = ("simulated", "synthetic", "unit", "evaluated_round", "rounds_with_absent", "counted_with_noise")
    assert tuple(figures[key] for key in keys) == (True, True, "image", 3, 1, None)
    output = CliRunner().invoke(app, [str(plain), str(simulated)]).output
    (said,) = (line for line in output.replace("\n", " ").split(f"{simulated}: ")[1:])
    for words in (
        "synthetic phantoms", "simulated, without parties and signatures", "epsilon is per image, not per patient",
        f"accuracy is that after round 3 of {config.training.rounds}", "absent in 1 of",
    ):  # fmt: skip
        assert words in said
    assert f"{plain}:" not in output  # there is nothing to say of it


def test_no_epsilon_is_shown_where_it_holds_for_one_hospital_no_more(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0.8, Config())
    spent = json.loads((run / "summary.json").read_text())["privacy"]
    _changed(run, privacy=[*spent[:2], {**spent[2], "epsilon": None, "noise_multiplier": None}])
    read = read_run(run)
    assert read.figures()["epsilon"] is None and "no epsilon holds" in " ".join(read.remarks())


def test_values_that_differ_late_are_not_shown_alike(tmp_path: Path) -> None:
    names = [f"a class with a long name {number}" for number in range(3)]
    columns = [{"name": "age", "range": [0, 120]}, {"name": "crp", "range": [0, 500]}]
    other = [{"name": "crp", "range": [0, 400]}, {"name": "age", "range": [0, 120]}]

    def settings(classes: list[str], of: list[dict[str, Any]]) -> Config:
        return parse_config({"data": {"source": "csv", "classes": classes, "table": {"columns": of}}}, "x")

    one = _run(tmp_path / "one", 0.8, settings([*names, "x"], columns))
    two = _run(tmp_path / "two", 0.8, settings([*names, "y"], other))
    assert differing_settings([read_run(one), read_run(two)]) == {
        "data.classes": [[*names, "x"], [*names, "y"]],
        "data.table.columns.order": [["age", "crp"], ["crp", "age"]],
        "data.table.columns.crp.range": [[0.0, 500.0], [0.0, 400.0]],
    }
    (unlike,) = [
        values
        for key, values in differing_settings(
            [read_run(one), read_run(_run(tmp_path / "three", 0.8, Config()))]
        ).items()
        if key.startswith("data.table.columns")
    ]
    assert len(unlike[0]) == 2 and unlike[1] is None  # of runs of other kinds no line for each entry
    shown = CliRunner().invoke(app, [str(one), str(two)]).output
    assert '"x"]' in shown and '"y"]' in shown


def test_who_gives_another_directory_is_told_which(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 0.8, Config())
    (run / "parties" / "hospital-0").mkdir(parents=True)
    for name in ("run.failed", "search", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "search" / "tune.json").touch()
    for directory, words in {
        run / "parties" / "hospital-0": f"one party has of a run on one machine: give {run}",
        tmp_path / "run.failed": "has not come to its end",
        tmp_path / "search": f"give {tmp_path / 'search' / 'final'}",
        tmp_path / "nowhere": "no such directory",
        tmp_path / "empty": "give the directory of a finished training run",
    }.items():
        with pytest.raises(MpcFlError, match=re.escape(words)) as caught:
            read_run(directory)
        assert str(caught.value.what) == f"cannot read {directory / 'summary.json'}"
