"""`mpc-fl compare` says what runs reached and where they differ, from their own files, and refuses what is no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mpc_fl.apps.cli.comparison import compare
from mpc_fl.apps.comparing import differing_settings, read_run
from mpc_fl.apps.summaries import PrivacySpent, Scores, TrainingSummary
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


def test_runs_stand_side_by_side_with_what_differs(tmp_path: Path) -> None:
    one = _run(tmp_path / "one", 0.81, parse_config({"training": {"rounds": 3}}, "x"))
    two = _run(
        tmp_path / "two", None, parse_config({"name": "other", "federation": {"session": "s"}}, "x"), epsilon=None
    )
    runs = [read_run(one), read_run(two)]
    assert differing_settings(runs) == {"training.rounds": [3, 5]}
    figures = runs[0].figures()
    assert (figures["accuracy"], figures["epsilon"], figures["auc_macro"], figures["delta"]) == (0.81, 5.5, 0.91, 1e-5)
    assert (runs[1].figures()["accuracy"], runs[1].figures()["epsilon"]) == (None, None)
    shown = CliRunner().invoke(app, [str(one), str(two)])
    text = " ".join(shown.output.split())
    assert shown.exit_code == 0 and "81.0% (76.0% to 86.0%)" in text and "training.rounds 3 5" in text
    printed = json.loads(CliRunner().invoke(app, [str(one), str(two), "--json"]).output)
    assert [run["rounds"] for run in printed["runs"]] == [3, 5] and printed["settings"] == {"training.rounds": [3, 5]}
    assert "No setting differs" in CliRunner().invoke(app, [str(one), str(one)]).output


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{}", b"[1]", b'{"kind": "infer"}', b'{"kind": "train"}', b"\xff", b"[" * 10_000],
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
