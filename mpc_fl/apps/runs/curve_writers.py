"""Where a party's curves are shown: event files for TensorBoard, or a run in MLflow. Both packages are extras.

A round's numbers are all that its line of metrics.jsonl holds: those of this party, and of nobody else. What is without noise in
them describes this site's patients, so event files stay in the party's directory, and an MLflow server should be the site's own.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mpc_fl.errors import ConfigError

_MODULES = {"tensorboard": "tensorboard", "mlflow": "mlflow"}


class CurveWriter(Protocol):
    """Takes rounds in their order, each once; `kept` is what it needs to go on after a restart, ready for JSON."""

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """The numbers of a round."""

    def forget_from(self, number: int) -> None:
        """Rounds from this one on are made anew: those that were written count as none."""

    @property
    def kept(self) -> dict[str, Any]:
        """`round`: the last one that is safely written, -1 before the first; and what else it needs."""

    def close(self, complete: bool) -> None:
        """No more rounds; `complete`: because the run is."""


def numbers_of(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, those within objects as `seconds/train`; lists, texts and nulls are no curves."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{inner}": number for inner, number in numbers_of(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "round":
            found[key] = float(value)
    return found


def require_installed(name: str) -> None:
    """Raise `ConfigError` with pip's command where the package behind `site.watch` is not installed."""
    if importlib.util.find_spec(_MODULES[name]) is None:
        raise ConfigError(f"site.watch names {name}, which is not installed", f"pip install 'mpc-fl[{name}]'")


class TensorBoardWriter:
    """Event files in a folder of the party. Rounds that are made anew are purged, as TensorBoard calls it."""

    def __init__(self, folder: Path, kept: Mapping[str, Any]) -> None:
        """`kept` is that of the writer before, empty for a new run."""
        self._folder, self._last = folder, int(kept.get("round", -1))
        self._open(self._last + 1 if kept else None)

    def _open(self, purged: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(self._folder), purge_step=purged)

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """On the disk when this returns."""
        for name, value in values.items():
            self._events.add_scalar(name, value, number)
        self._events.flush()
        self._last = number

    def forget_from(self, number: int) -> None:
        """A new event file, which says that steps from `number` on do not count."""
        self._events.close()
        self._last = min(self._last, number - 1)
        self._open(number)

    @property
    def kept(self) -> dict[str, Any]:
        """See `CurveWriter`."""
        return {"round": self._last}

    def close(self, complete: bool) -> None:
        """See `CurveWriter`."""
        self._events.close()


class MlflowWriter:
    """A run in MLflow, the same after a restart. MLflow takes nothing back, so a round is sent when the next one is there.

    By then all have signed it, and it is not made anew. Should it be all the same (its checkpoint was damaged), a new run begins.
    """

    def __init__(self, uri: str, experiment: str, party: str, kept: Mapping[str, Any]) -> None:
        """`kept` is that of the writer before, empty for a new run. Raises what MLflow raises where the server cannot be asked."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers of its use
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").handlers.clear()  # it would write to standard error
        warnings.filterwarnings("ignore", module="mlflow")
        self._client, self._party = MlflowClient(uri), party
        found = self._client.get_experiment_by_name(experiment)
        self._experiment = self._client.create_experiment(experiment) if found is None else found.experiment_id
        self._last, self._waiting = int(kept.get("round", -1)), dict[int, tuple[Mapping[str, float], int]]()
        run = kept.get("run")
        if run is None:
            run = self._client.create_run(self._experiment, run_name=party, tags={"party": party}).info.run_id
        else:
            self._client.update_run(run, status="RUNNING")
        self._run: str = run

    def write(self, number: int, values: Mapping[str, float]) -> None:
        """Sends the rounds before this one."""
        self._waiting.setdefault(number, (values, int(time.time() * 1000)))
        self._send(before=number)

    def _send(self, before: int | None) -> None:
        from mlflow.entities import Metric

        for number in sorted(n for n in self._waiting if before is None or n < before):
            values, moment = self._waiting[number]
            metrics = [Metric(name, value, moment, number) for name, value in values.items()]
            self._client.log_batch(self._run, metrics=metrics)
            self._last = number
            del self._waiting[number]

    def forget_from(self, number: int) -> None:
        """Drops what waits; a round that was sent ends this run, and another begins with the first round."""
        self._waiting = {n: waiting for n, waiting in self._waiting.items() if n < number}
        if number <= self._last:
            self._client.set_tag(self._run, "replaced", f"round {number} was made anew")
            self._client.set_terminated(self._run, "KILLED")
            self._run = self._client.create_run(
                self._experiment, run_name=self._party, tags={"party": self._party}
            ).info.run_id
            self._last, self._waiting = -1, {}

    @property
    def kept(self) -> dict[str, Any]:
        """See `CurveWriter`."""
        return {"round": self._last, "run": self._run}

    def close(self, complete: bool) -> None:
        """Of a run that is complete the last round is sent, too."""
        if complete:
            self._send(before=None)
        self._client.set_terminated(self._run, "FINISHED" if complete else "FAILED")
