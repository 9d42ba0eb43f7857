"""Training runs side by side: what they reached, under which promise, and where their configurations differ. Pure but for reading.

A run is read from its own files, `summary.json` and `config.yaml`, whatever version wrote them; what one lacks stays empty. Of a
run on several machines the directory of any party does, with what that party has: at a hospital epsilon and accuracy of its own
patients, at the aggregator the opened evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpc_fl.apps.costs import costs_of_all
from mpc_fl.apps.search_summary import SEARCH_FILE
from mpc_fl.apps.summaries import SUMMARY_FILE, PartySummary, TrainingSummary
from mpc_fl.errors import DataError, MpcFlError
from mpc_fl.parsing import parse_json, parse_yaml

# Differ from run to run and say nothing of what was trained.
_OF_NO_MATTER = ("site", "federation.session", "federation.addresses", "runtime.first_port", "name")

_UNFINISHED = (".partial", ".failed")  # how the directory of a run is called until it is complete


@dataclass(frozen=True)
class RunResults:
    """A training run: where it lies, what its summary says, its settings by key (`training.rounds`), and whose it is, where it
    is what one party has of it."""

    where: str
    summary: TrainingSummary
    settings: dict[str, Any]
    party: PartySummary | None = None

    def figures(self) -> dict[str, float | int | str | None]:
        """What is compared, by name; `None` where the run does not say it.

        `epsilon` is the largest of its hospitals that are here, None where it holds for one of them no more, and `unit` what it is
        counted by. `own_accuracy` is that of a hospital on its own test records, of one party's directory. `evaluated_round` is
        the round that accuracy is of, `counted_with_noise` the standard deviation of its counts, `rounds_with_absent` how many
        rounds a hospital was missing in. Costs (`costs.RunCosts`) are of all parties whose costs are here, `seconds` by the clock.
        """
        scores, privacy, costs = (
            self.summary.final,
            self.summary.privacy,
            costs_of_all((self.summary.costs or {}).values()),
        )
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
            "epsilon": max(epsilons, default=None) if len(epsilons) == len(privacy) else None,
            "delta": max((spent.delta for spent in privacy if spent.epsilon is not None), default=None),
            "mechanism": privacy[0].mechanism if privacy else None,
            "noise_multiplier": max(noises, default=None),
            "seconds": self.summary.seconds,
            "unit": self.summary.counted_unit,
            "synthetic": self.summary.synthetic,
            "simulated": self.summary.simulated,
            "central": self.summary.central,
            "evaluated_round": self.summary.evaluated_round,
            "counted_with_noise": None if scores is None else scores.noise,
            "rounds_with_absent": len(self.summary.absences()),
            **asdict(costs),
        }

    @property
    def arrangement(self) -> str:
        """How it was trained, in some words: where patients were, and what stood between them and the others."""
        if self.summary.central:
            return "central"
        said = {spent.mechanism for spent in self.summary.privacy} or {
            str(self.settings.get("privacy.mechanism", "none"))
        }
        mechanisms = said - {"none"}
        how = "simulated, " if self.summary.simulated else ""
        return f"{how}secure sums" + (f", {' and '.join(sorted(mechanisms))} noise" if mechanisms else "")

    def remarks(self) -> list[str]:
        """What a reader of its figures has to know beside them, in some words each."""
        of, said = self.figures(), list[str]()
        if of["synthetic"]:
            said.append("synthetic phantoms, not patients")
        if of["central"]:
            said.append("all patients in one place, nobody was protected from anybody")
        if of["simulated"]:
            said.append("simulated, without parties and signatures")
        if of["mechanism"] not in (None, "none"):
            if of["epsilon"] is None:
                said.append("no epsilon holds, since a run without privacy released the same patients' data")
            elif of["unit"] != "patient":
                said.append(f"epsilon is per {of['unit']}, not per patient")
        evaluated, rounds = self.summary.evaluated_round, self.summary.rounds
        if self.summary.final is not None and evaluated is not None and evaluated < rounds:
            said.append(f"accuracy is that after round {evaluated} of {rounds}")
        if of["counted_with_noise"] is not None:
            said.append(f"test {of['unit']}s were counted with noise of {of['counted_with_noise']:.1f}")
        if of["rounds_with_absent"]:
            said.append(f"a hospital was absent in {of['rounds_with_absent']} of {rounds} rounds")
        return said


def read_run(directory: Path) -> RunResults:
    """What a run's directory says. Raises `MpcFlError` where it is not that of a finished training run."""
    summary = _content(directory, SUMMARY_FILE, parse_json)
    kind = summary.get("kind") if isinstance(summary, dict) else None
    if kind not in (TrainingSummary.KIND, PartySummary.KIND):
        raise MpcFlError(f"{directory} is no finished training run", "give the --out of mpc-fl train or mpc-fl party")
    try:
        where = str(directory / SUMMARY_FILE)
        party = PartySummary.from_json(summary, where) if kind == PartySummary.KIND else None
        of = TrainingSummary.from_json(summary, where) if party is None else party.as_training()
    except DataError as error:
        raise MpcFlError(f"{directory}: {error}", "it was changed, or another version wrote it") from None
    settings = _content(directory, "config.yaml", parse_yaml)
    return RunResults(str(directory), of, dict(_flat(settings if isinstance(settings, dict) else {})), party)


def _content(directory: Path, name: str, parse: Any) -> Any:
    try:
        return parse((directory / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise MpcFlError(f"cannot read {directory / name}", _where_to_look(directory)) from None


def _where_to_look(directory: Path) -> str:
    """What to give instead of a directory that is not that of a finished run."""
    if not directory.is_dir():
        return "there is no such directory: give that of a finished training run"
    if (directory / SEARCH_FILE).exists():
        return f"it is a search over settings: give {directory / 'final'}, or one of {directory / 'trials'}"
    if directory.suffix in _UNFINISHED:
        return "that run has not come to its end: see its logs, and whether --resume goes on with it"
    parties = directory.absolute().parent
    if parties.name == "parties" and (parties.parent / SUMMARY_FILE).exists():
        return f"it is what one party has of a run on one machine: give {directory.parent.parent}"
    return "give the directory of a finished training run"


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = list[tuple[str, Any]]()
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in _OF_NO_MATTER:
            found += _flat(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
    return found


def differing_settings(runs: Sequence[RunResults]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, with the value of each, `None` where it has none.

    Where all runs have a list of sections or of lists, its entries are compared: by their names, or by their places from 0.
    """
    return _differing([run.settings for run in runs])


def _differing(settings: list[dict[str, Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for key in dict.fromkeys(key for of in settings for key in of):
        values = [of.get(key) for of in settings]
        if all(value == values[0] for value in values[1:]):
            continue
        if all(isinstance(value, list) and any(isinstance(item, dict | list) for item in value) for value in values):
            entries = _differing([dict(_flat(_by_name(value or []))) for value in values])
            found |= {f"{key}.{name}": of for name, of in entries.items()}
        else:
            found[key] = values
    return found


def _by_name(items: list[Any]) -> dict[str, Any]:
    """A list as one section: by the names of its entries, with the order of these, or by their places."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
        return {"order": names, **dict(zip(map(str, names), items, strict=True))}
    return {str(place): item for place, item in enumerate(items)}
