"""A run's directory: what a failure leaves there, and what the next run under that name says of it."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from mpc_fl.apps.cli.diagnosis import _print_summary
from mpc_fl.apps.cli.options import say_earlier_failure
from mpc_fl.apps.cli.training import train
from mpc_fl.apps.runs import launcher, local_runs
from mpc_fl.apps.runs.run_directory import COMMON, run_directory
from mpc_fl.errors import MpcFlError

DEMO = Path(__file__).resolve().parents[3] / "configs" / "demo.yaml"


def _fail(out: Path, words: str) -> Path:
    with contextlib.suppress(MpcFlError), run_directory(out) as directory:
        (directory / "logs").mkdir()
        (directory / "logs" / "a.log").write_text(words)
        raise MpcFlError("it failed")
    return out.with_name(f"{out.name}.failed")


def test_a_complete_run_says_where_an_earlier_failure_lies_and_how_to_remove_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my run"
    _fail(out, "first")
    failed = _fail(out, "second")
    with run_directory(out) as directory:
        (directory / "model").touch()
    assert (
        failed / "logs" / "a.log"
    ).read_text() == "second"  # a failure takes the place of the one before, a run of none
    say_earlier_failure(out)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(failed) in said
    assert shlex.split(said.partition("needed: ")[2]) == ["rm", "-r", str(failed)]
    shutil.rmtree(failed)
    say_earlier_failure(out)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("state", [False, True], ids=["before a round was completed", "after one"])
def test_what_a_party_was_writing_when_it_was_killed_is_kept_by_no_failed_run(state: bool, tmp_path: Path) -> None:
    """A privacy ledger, before it had its name: nothing was charged in it yet. One that is whole stays, with its journal."""
    out = tmp_path / "run"
    whole = ["hospital-1-privacy.sqlite3", "hospital-1-privacy.sqlite3-journal"]
    with contextlib.suppress(MpcFlError), run_directory(out) as directory:
        (directory / "logs").mkdir()
        (directory / "logs" / "a.log").touch()
        party = directory / "parties" / "hospital-0"
        party.mkdir(parents=True)
        for name in (".hospital-0-privacy.sqlite3.x.partial", ".hospital-0-privacy.sqlite3.x.partial-journal", *whole):
            (party / name).touch()
        if state:
            (party / COMMON).mkdir()
            (party / COMMON / "checkpoint-1.safetensors").touch()
        raise MpcFlError("a hospital was killed")
    failed = out.with_name("run.failed")
    assert sorted(path.name for path in failed.rglob("*privacy*")) == whole
    assert not out.with_name("run.partial").exists()


def test_train_and_infer_say_it_to_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = tmp_path / "run"
    failed = _fail(out, "x")
    summary = SimpleNamespace(to_json=dict, unreported=None)
    monkeypatch.setattr(launcher, "start_early", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(local_runs, "train", lambda *_: summary)
    app = typer.Typer()
    app.command()(train)
    result = CliRunner().invoke(app, [str(DEMO), "--out", str(out), "--json"])
    assert json.loads(result.output)["earlier_failure"] == str(failed)
    capsys.readouterr()
    _print_summary(summary, out)  # type: ignore[arg-type]
    assert json.loads(capsys.readouterr().out)["earlier_failure"] == str(failed)
