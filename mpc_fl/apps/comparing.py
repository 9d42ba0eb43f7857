"""Training runs side by side: what they reached, under which promise, and where their configurations differ. Pure but for reading.

A run is read from its own files, `summary.json` and `config.yaml`, whatever version wrote them; what one lacks stays empty. Of a
run on several machines the directory of any party does, with what that party has: at a hospital epsilon and accuracy of its own
patients, at the aggregator the opened evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpc_fl.apps.summaries import SUMMARY_FILE, PartySummary, TrainingSummary
from mpc_fl.errors import DataError, MpcFlError
from mpc_fl.parsing import parse_json, parse_yaml

# Differ from run to run and say nothing of what was trained.
_OF_NO_MATTER = ("site", "federation.session", "federation.addresses", "runtime.first_port", "name")


@dataclass(frozen=True)
class RunResults:
    """A training run: where it lies, what its summary says, its settings by key (`training.rounds`), and whose it is, where it
    is what one party has of it."""

    where: str
    summary: TrainingSummary
    settings: dict[str, Any]
    party: PartySummary | None = None

    def figures(self) -> dict[str, float | int | str | None]:
        """What is compared, by name; `None` where the run does not say it. Epsilon is the largest of its hospitals that are here.

        `own_accuracy` is that of a hospital on its own test records, of one party's directory.
        """
        scores, privacy = self.summary.final, self.summary.privacy
        epsilons = [spent.epsilon for spent in privacy if spent.epsilon is not None]
        noises = [spent.noise_multiplier for spent in privacy if spent.noise_multiplier is not None]
        return {
            "name": self.summary.name,
            "party": None if self.party is None else self.party.party,
            "hospitals": len(self.summary.hospitals),
            "rounds": self.summary.rounds,
            "parameters": self.summary.parameters,
            "accuracy": None if scores is None else scores.accuracy,
            "accuracy_low": None if scores is None else scores.accuracy_low,
            "accuracy_high": None if scores is None else scores.accuracy_high,
            "balanced_accuracy": None if scores is None else scores.balanced_accuracy,
            "auc_macro": None if scores is None else scores.auc_macro,
            "test_records": None if scores is None else scores.records,
            "own_accuracy": None if self.party is None else self.party.own_accuracy,
            "own_test_records": None if self.party is None else (self.party.records or {}).get("test"),
            "epsilon": max(epsilons, default=None),
            "delta": max((spent.delta for spent in privacy if spent.epsilon is not None), default=None),
            "mechanism": privacy[0].mechanism if privacy else None,
            "noise_multiplier": max(noises, default=None),
            "seconds": self.summary.seconds,
        }


def read_run(directory: Path) -> RunResults:
    """What a run's directory says. Raises `MpcFlError` where it is not that of a finished training run."""
    summary = _content(directory / SUMMARY_FILE, parse_json)
    kind = summary.get("kind") if isinstance(summary, dict) else None
    if kind not in (TrainingSummary.KIND, PartySummary.KIND):
        raise MpcFlError(f"{directory} is no finished training run", "give the --out of mpc-fl train or mpc-fl party")
    try:
        where = str(directory / SUMMARY_FILE)
        party = PartySummary.from_json(summary, where) if kind == PartySummary.KIND else None
        of = TrainingSummary.from_json(summary, where) if party is None else party.as_training()
    except DataError as error:
        raise MpcFlError(f"{directory}: {error}", "it was changed, or another version wrote it") from None
    settings = _content(directory / "config.yaml", parse_yaml)
    return RunResults(str(directory), of, dict(_flat(settings if isinstance(settings, dict) else {})), party)


def _content(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MpcFlError(f"cannot read {path}", "give the directory of a finished training run") from None


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = list[tuple[str, Any]]()
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in _OF_NO_MATTER:
            found += _flat(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
    return found


def differing_settings(runs: Sequence[RunResults]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, with the value of each, `None` where it has none."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: of for key, of in values.items() if any(value != of[0] for value in of[1:])}
