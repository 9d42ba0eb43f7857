"""Curves of a party from its metrics.jsonl: each round once, also after a restart and when a round is made anew."""

from __future__ import annotations

import glob
import importlib.util
import json
import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mpc_fl.apps.runs import curve_writers, curves
from mpc_fl.apps.runs.curve_writers import MlflowWriter, TensorBoardWriter, numbers_of
from mpc_fl.apps.runs.curves import CurveFollower, curves_of
from mpc_fl.config.config import parse_config
from mpc_fl.errors import ConfigError
from mpc_fl.files import append_json_line, keep_json_lines

with_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="pip install 'mpc-fl[tensorboard]'"
)
with_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="pip install 'mpc-fl[mlflow]'")


def line(number: int, loss: float) -> dict[str, Any]:
    return {"round": number, "loss": loss, "method": "vmap", "epsilon": None, "seconds": {"train": 2.0 * number}}


class Recorded:
    """A writer that takes rounds back, as TensorBoard does; `rounds` is what stands."""

    def __init__(self, last: int = -1) -> None:
        self.rounds: dict[int, float] = {}
        self.last, self.wrote, self.closed = last, list[int](), list[bool]()

    def write(self, number: int, values: Mapping[str, float]) -> None:
        assert number not in self.rounds, "written twice"
        self.rounds[number], self.last = values["loss"], number
        self.wrote.append(number)

    def forget_from(self, number: int) -> None:
        self.rounds = {n: loss for n, loss in self.rounds.items() if n < number}
        self.last = min(self.last, number - 1)

    @property
    def kept(self) -> dict[str, Any]:
        return {"round": self.last}

    def close(self, complete: bool) -> None:
        self.closed.append(complete)


def test_numbers_alone_are_curves_and_those_within_objects_too() -> None:
    values = {
        "round": 3,
        "loss": 1.5,
        "steps": 4,
        "ok": True,
        "a": None,
        "b": [1, 2],
        "seconds": {"train": 2.0, "x": {"y": 1}},
    }
    assert numbers_of(values) == {"loss": 1.5, "steps": 4.0, "seconds/train": 2.0, "seconds/x/y": 1.0}


def test_each_round_is_written_once_however_often_it_is_looked(tmp_path: Path) -> None:
    metrics, writer = tmp_path / "metrics.jsonl", Recorded()
    follower = CurveFollower(metrics, lambda: writer)
    follower.follow()
    for number in (1, 2, 5):  # it took no part in 3 and 4
        append_json_line(metrics, line(number, float(number)))
        follower.follow()
        follower.follow()
    assert writer.rounds == {1: 1.0, 2: 2.0, 5: 5.0} and writer.wrote == [1, 2, 5]
    follower.close(True)
    assert writer.closed == [True]


def test_a_line_that_is_half_written_counts_when_it_is_whole(tmp_path: Path) -> None:
    metrics, writer = tmp_path / "metrics.jsonl", Recorded()
    follower, text = CurveFollower(metrics, lambda: writer), json.dumps(line(1, 1.0))
    metrics.write_text(text[:20])
    follower.follow()
    metrics.write_text(text + "\n")
    follower.follow()
    assert writer.wrote == [1]


@pytest.mark.parametrize("looked", [True, False])
def test_a_round_made_anew_replaces_the_one_before(tmp_path: Path, looked: bool) -> None:
    """Also where nobody looked between the line's removal and the new one."""
    metrics, writer = tmp_path / "metrics.jsonl", Recorded()
    follower = CurveFollower(metrics, lambda: writer)
    for number in (1, 2, 3):
        append_json_line(metrics, line(number, float(number)))
    follower.follow()
    keep_json_lines(metrics, lambda kept: kept["round"] < 2)
    if looked:
        follower.follow()
        assert writer.rounds == {1: 1.0}
    for number in (2, 3):
        append_json_line(metrics, line(number, 10.0 * number))
    follower.follow()
    assert writer.rounds == {1: 1.0, 2: 20.0, 3: 30.0}


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_after_a_restart_it_goes_on_and_what_the_file_lost_is_forgotten(tmp_path: Path, lost: int) -> None:
    metrics, writer = tmp_path / "metrics.jsonl", Recorded()
    first = CurveFollower(metrics, lambda: writer)
    for number in (1, 2, 3):
        append_json_line(metrics, line(number, float(number)))
    first.follow()
    keep_json_lines(metrics, lambda kept: kept["round"] <= 3 - lost)
    again = CurveFollower(metrics, lambda: writer)
    for number in range(4 - lost, 6):
        append_json_line(metrics, line(number, 10.0 * number))
    again.follow()
    assert writer.rounds == {n: float(n) if n <= 3 - lost else 10.0 * n for n in range(1, 6)}
    assert writer.wrote == [1, 2, 3, *range(4 - lost, 6)]


def test_a_missing_package_is_refused_with_the_command_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "mlflow"):
        config = parse_config({"site": {"watch": [name], "out": str(tmp_path)}}, "test")
        with pytest.raises(ConfigError, match=rf"site\.watch names {name}, .*: pip install 'mpc-fl\[{name}\]'"):
            with curves_of(config, "hospital-0"):
                raise AssertionError("it has started")


def test_settings_that_do_not_go_together_are_refused() -> None:
    for site, words in (
        ({"mlflow_uri": "http://here:5000"}, "used by watch"),
        ({"watch": ["mlflow", "mlflow"]}, "twice"),
        ({"watch": ["wandb"]}, r"site\.watch"),
        ({"watch": ["mlflow"], "mlflow_uri": "http://user:word@here"}, r"site\.mlflow_uri"),
        ({"watch": ["mlflow"], "mlflow_uri": "databricks"}, r"site\.mlflow_uri"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_config({"site": site}, "test")
    plain, watched = parse_config({}, "test"), parse_config({"site": {"watch": ["tensorboard"]}}, "test")
    assert plain.digest() == watched.digest()


def test_a_writer_that_fails_ends_no_run_and_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that is away for a while: the rounds are written when it is back."""
    writer, away, written = Recorded(), [True], threading.Event()

    def opened(*_: Any) -> Any:
        def open_writer() -> Recorded:
            if away[0]:
                away[0] = False
                raise ConnectionError("password of the server")
            written.set()
            return writer

        return open_writer

    monkeypatch.setattr(curves, "_opener", opened)
    monkeypatch.setattr(curves, "require_installed", lambda name: None)
    monkeypatch.setattr(curves, "_PERIOD", 0.01)
    config = parse_config({"site": {"watch": ["tensorboard"], "out": str(tmp_path)}}, "test")
    with caplog.at_level(logging.WARNING), curves_of(config, "hospital-0"):
        append_json_line(tmp_path / "metrics.jsonl", line(1, 1.0))
        assert written.wait(30)
        append_json_line(tmp_path / "metrics.jsonl", line(2, 2.0))
    assert writer.rounds == {1: 1.0, 2: 2.0} and writer.closed == [True]
    assert "cannot be written now: ConnectionError" in caplog.text and "password" not in caplog.text
    assert json.loads((tmp_path / "curves.json").read_text()) == {"tensorboard": {"round": 2}}


def test_a_party_that_fails_closes_its_curves_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Recorded()
    monkeypatch.setattr(curves, "_opener", lambda *_: lambda: writer)
    monkeypatch.setattr(curves, "require_installed", lambda name: None)
    config = parse_config({"site": {"watch": ["tensorboard"], "out": str(tmp_path)}}, "test")
    with pytest.raises(ValueError, match="^no$"), curves_of(config, "hospital-0"):
        append_json_line(tmp_path / "metrics.jsonl", line(1, 1.0))
        raise ValueError("no")
    assert writer.rounds == {1: 1.0} and writer.closed == [False]


def test_without_watch_nothing_is_started_or_imported(tmp_path: Path) -> None:
    before = threading.active_count()
    with curves_of(parse_config({"site": {"out": str(tmp_path)}}, "test"), "hospital-0"):
        assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


# ---- with the packages -------------------------------------------------------------------------------------------------


def scalars(folder: Path, name: str) -> dict[int, float]:
    """What TensorBoard shows of a curve: it purges as it reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    steps = [event.step for event in events.Scalars(name)]
    assert len(steps) == len(set(steps)), "a step is there twice"
    return {event.step: event.value for event in events.Scalars(name)}


@with_tensorboard
def test_tensorboard_shows_each_round_once_after_a_restart_and_a_round_made_anew(tmp_path: Path) -> None:
    metrics, folder, kept = tmp_path / "metrics.jsonl", tmp_path / "tensorboard", dict[str, Any]()
    first = CurveFollower(metrics, lambda: TensorBoardWriter(folder, kept))
    for number in (1, 2, 3):
        append_json_line(metrics, line(number, float(number)))
        first.follow()
    assert scalars(folder, "loss") == {1: 1.0, 2: 2.0, 3: 3.0}
    assert scalars(folder, "seconds/train") == {1: 2.0, 2: 4.0, 3: 6.0}
    keep_json_lines(metrics, lambda kept: kept["round"] < 3)  # it is made anew in the same process
    append_json_line(metrics, line(3, 30.0))
    first.follow()
    assert scalars(folder, "loss") == {1: 1.0, 2: 2.0, 3: 30.0}
    kept = first.kept or {}
    assert kept == {"round": 3}
    keep_json_lines(metrics, lambda kept: kept["round"] < 3)  # killed here, and resumed from round 2
    again = CurveFollower(metrics, lambda: TensorBoardWriter(folder, kept))
    for number in (3, 4):
        append_json_line(metrics, line(number, 100.0 * number))
    again.close(True)
    assert scalars(folder, "loss") == {1: 1.0, 2: 2.0, 3: 300.0, 4: 400.0}
    assert "tensorflow" not in sys.modules


def histories(folder: Path, experiment: str, name: str) -> list[list[tuple[int, float]]]:
    """The curve in every run of an experiment, the first run first."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(folder.absolute().as_uri())
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], order_by=["start_time ASC"])
    return [
        [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)] for run in found
    ]


@with_mlflow
def test_mlflow_has_each_round_once_in_one_run_after_a_restart(tmp_path: Path) -> None:
    metrics, folder, kept = tmp_path / "metrics.jsonl", tmp_path / "mlflow", dict[str, Any]()

    def opened() -> MlflowWriter:
        return MlflowWriter(folder.absolute().as_uri(), "phantoms", "hospital-0", kept)

    first = CurveFollower(metrics, opened)
    for number in (1, 2, 3):
        append_json_line(metrics, line(number, float(number)))
        first.follow()
    assert histories(folder, "phantoms", "loss") == [[(1, 1.0), (2, 2.0)]]  # the last may still be made anew
    kept = first.kept or {}
    keep_json_lines(metrics, lambda kept: kept["round"] < 3)  # killed here, and resumed from round 2
    again = CurveFollower(metrics, opened)
    for number in (3, 4):
        append_json_line(metrics, line(number, 100.0 * number))
        again.follow()
    again.close(True)
    assert histories(folder, "phantoms", "loss") == [[(1, 1.0), (2, 2.0), (3, 300.0), (4, 400.0)]]
    # A round that was sent and is made anew all the same: MLflow takes nothing back, so a run of its own begins.
    kept = again.kept or {}
    keep_json_lines(metrics, lambda kept: kept["round"] < 2)
    last = CurveFollower(metrics, opened)
    append_json_line(metrics, line(2, 7.0))
    last.close(True)
    assert histories(folder, "phantoms", "loss")[-1] == [(1, 1.0), (2, 7.0)]


@with_mlflow
def test_mlflow_tells_nobody_of_its_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    MlflowWriter((tmp_path / "mlflow").absolute().as_uri(), "phantoms", "hospital-0", {}).close(True)
    assert curve_writers.os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@with_tensorboard
@pytest.mark.processes
@pytest.mark.slow
def test_each_party_of_a_run_has_its_own_curves_and_nobody_elses(tmp_path: Path) -> None:
    from mpc_fl.apps.runs.local_runs import train

    config = parse_config(
        {
            "data": {"image_size": 8, "phantoms": {"train_patients": 90, "test_patients": 30}},
            "training": {"rounds": 3, "local_steps": 1, "batch_size": 8},
            "privacy": {"noise_multiplier": 2.0, "delta": 1e-3},
            "federation": {"hospitals": 2},
            "site": {"watch": ["tensorboard"], "precision": "bfloat16"},
        },
        "test",
    )
    train(config, tmp_path / "run", "mpc-fl train", lambda *_: None)
    for party in ("hospital-0", "hospital-1"):
        directory = tmp_path / "run" / "parties" / party
        lines = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
        shown = scalars(directory / "tensorboard", "loss")
        assert shown == pytest.approx({one["round"]: one["loss"] for one in lines}) and len(shown) == 3
    assert sorted(scalars(tmp_path / "run" / "parties" / "aggregator" / "tensorboard", "evaluation/accuracy")) == [0, 3]
    assert not glob.glob(str(tmp_path / "run" / "tensorboard*"))
