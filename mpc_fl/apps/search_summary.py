"""What a search over settings says about itself when it is over: the content of tune.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mpc_fl.apps.scores import Scores
from mpc_fl.apps.summaries import FittedCalibration
from mpc_fl.apps.typed_json import typed

SEARCH_FILE = "tune.json"


@dataclass(frozen=True)
class TrialResult:
    """One trial: its settings by key, as JSON, and what validation opened of its model: `figure` is what trials are compared by.

    `round` is the one that the model is of; `failed` says why there is no figure, where there is none.
    """

    number: int
    settings: dict[str, str]
    figure: float | None = None
    validation: Scores | None = None
    round: int | None = None
    seconds: float = 0.0
    failed: str | None = None


@dataclass(frozen=True)
class SearchSpent:
    """Epsilon of a hospital's patients by its privacy ledger: after the trials, and after the last run; None where none holds."""

    hospital: str
    after_trials: float | None
    after_all: float | None


@dataclass(frozen=True, kw_only=True)
class SearchSummary:
    """Of `mpc-fl tune`. `chosen` is the number of the trial whose settings the last run had, `final` its test figure.

    `share` of the budget was for the trials, None where it was divided equally; `noise_multiplier` was that of all trials.
    """

    name: str
    synthetic: bool
    command: str
    versions: dict[str, str]
    criterion: str
    trials: list[TrialResult]
    chosen: int
    final: Scores | None
    calibration: FittedCalibration | None
    mechanism: str
    epsilon: float
    delta: float
    share: float | None
    noise_multiplier: float | None
    spent: list[SearchSpent]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The content of tune.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, where: str = SEARCH_FILE) -> SearchSummary:
        """Raises `DataError` when `value` is not the content of such a file; `where` names it."""
        return typed(cls, value, where)


def best_trial(trials: list[TrialResult]) -> TrialResult | None:
    """The one with the largest figure, of equal ones the first; None where no trial has one."""
    return max((trial for trial in trials if trial.figure is not None), key=_by_figure, default=None)


def _by_figure(trial: TrialResult) -> tuple[float, int]:
    return (trial.figure or 0.0, -trial.number)
