"""A search over settings: a run for each, compared by validation, then one with the best settings that is tested.

Every trial is a whole run of local processes in `<out>.partial/trials`, and leaves test patients alone. All runs charge the same
privacy ledgers. What is done is written down after each trial, so a search that was ended goes on (`resume`): finished trials
stay, one that was under way goes on from its last round, or is made anew where it had none. What a trial has charged stays
charged, also when it failed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpc_fl.apps.rows import read_object
from mpc_fl.apps.runs.local_runs import train
from mpc_fl.apps.runs.run_directory import may_go_on, require_free, versions
from mpc_fl.apps.search_summary import SEARCH_FILE, SearchSpent, SearchSummary, TrialResult, best_trial
from mpc_fl.apps.summaries import SUMMARY_FILE, TrainingSummary
from mpc_fl.config.config import Config, parse_config
from mpc_fl.config.loading import apply_overrides
from mpc_fl.errors import ConfigError, RunFailedError
from mpc_fl.federation.ledger_forecast import LedgerForecast
from mpc_fl.federation.planning import budget_of
from mpc_fl.federation.search_budget import noise_of_last, noise_of_trials
from mpc_fl.files import write_json, write_text
from mpc_fl.learning.data.loading import patients_per_hospital
from mpc_fl.learning.models.feature_extractor import require_weights
from mpc_fl.learning.privacy.accounting import SubsampledGaussian
from mpc_fl.learning.privacy.privacy_ledger import PrivacyLedger
from mpc_fl.progress import Progress
from mpc_fl.roles import hospital_names

_SEARCHED = ("training.", "model.", "privacy.clipping_norm")
_MOST_TRIALS = 256
_PLAN, _LOCK = "search.json", ".lock"


@dataclass(frozen=True)
class Search:
    """What is searched: settings by trial, and the share of the budget that all trials may take; None divides it equally."""

    config: Config
    settings: list[dict[str, Any]]
    share: float | None = None

    def trial(self, number: int, noise: float | None, ledgers: Path) -> Config:
        """The configuration of a trial, from 1 on."""
        config = self._with(self.settings[number - 1], f"{self.config.name} trial {number}")
        evaluation: dict[str, Any] = {"test": False, "every": None, "groups": {}}
        return _placed(config.with_values(evaluation=evaluation), noise, ledgers)

    def last(self, number: int, noise: float | None, ledgers: Path) -> Config:
        """That of the last run, with the settings of a trial."""
        return _placed(self._with(self.settings[number - 1], self.config.name), noise, ledgers)

    def _with(self, settings: Mapping[str, Any], name: str) -> Config:
        values = self.config.model_dump(mode="json")
        for key, value in settings.items():
            section, _, rest = key.partition(".")
            values[section][rest] = value
        values["name"] = name
        return parse_config(values, ", ".join(f"{key}={value}" for key, value in settings.items()))


def _placed(config: Config, noise: float | None, ledgers: Path) -> Config:
    privacy = {} if config.privacy.mechanism == "none" else {"noise_multiplier": noise}
    return config.with_values(privacy=privacy, site={"privacy_ledger": str(ledgers)})


def searched(config: Config, grid: Mapping[str, Sequence[Any]], share: float | None = None) -> Search:
    """Every combination of the values of each key. Raises `ConfigError` for what cannot be searched."""
    if not config.data.validation_fraction:
        raise ConfigError(
            "trials are compared on validation patients, and there are none", "set data.validation_fraction"
        )
    if not config.evaluation.test:
        raise ConfigError("the last run is judged on test patients", "leave evaluation.test as it is")
    if config.privacy.noise_multiplier is not None:
        raise ConfigError("the noise of trials follows from the budget", "leave privacy.noise_multiplier null")
    if share is not None and config.privacy.mechanism == "none":
        raise ConfigError(
            "--share divides a privacy budget, and there is none", "leave it out, or set privacy.mechanism"
        )
    for key, values in grid.items():
        if not key.startswith(_SEARCHED) or key.count(".") != 1:
            raise ConfigError(
                f"'{key}' cannot be searched", "search keys of training and model, and privacy.clipping_norm"
            )
        if not values:
            raise ConfigError(f"'{key}' has no values", "give several, for example training.learning_rate=0.1,0.3")
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(settings) < 2 or len({str(found) for found in settings}) < len(settings):
        raise ConfigError("a search needs at least two different trials", "give several values of a key with --try")
    if len(settings) > _MOST_TRIALS:
        raise ConfigError(f"{len(settings)} trials are more than {_MOST_TRIALS}", "search fewer values")
    return Search(config, settings, share)


def grid_of(values: object, source: str) -> dict[str, list[Any]]:
    """A grid as read from YAML: lists of values by key. Raises `ConfigError`."""
    if not isinstance(values, dict) or not all(isinstance(of, list) for of in values.values()):
        raise ConfigError(f"{source}: no lists of values by key", "for example training.learning_rate: [0.1, 0.3]")
    return {str(key): list(of) for key, of in values.items()}


def grid_setting(text: str) -> tuple[str, list[Any]]:
    """`a.b=x,y,z`, values read as YAML. Raises `ConfigError`."""
    key, separator, values = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--try {text!r} is not of the form a.b=x,y", "for example --try training.rounds=3,6")
    found = apply_overrides({}, [f"values=[{values}]"])["values"]
    return key.strip(), list(found)


def ledger_forecasts(search: Search) -> list[LedgerForecast]:
    """What privacy ledgers that outlive a search leave for it, of each hospital whose ledger holds something; charges nothing.

    The noise is that of the trials. Raises `PrivacyBudgetError` where the search does not fit.
    """
    config, directory = search.config, search.config.site.privacy_ledger
    if directory is None or config.privacy.mechanism == "none":
        return []
    ledgers = _ledgers(config, directory)
    spent = {name: ledger.spent() for name, ledger in ledgers.items()}
    if not any(spent.values()):
        return []
    trials, last = _runs_of(search, directory)
    noises = [noise_of_trials(trials, last, before, search.share) for before in (list(spent.values()), [])]
    budget = budget_of(config)
    return [
        LedgerForecast(
            name, ledgers[name].epsilon(budget.delta, budget.accountant), budget.epsilon, noises[0], noises[1]
        )
        for name, events in spent.items()
        if events
    ]


def _runs_of(search: Search, ledgers: Path) -> tuple[list[Config], list[Config]]:
    """All trials, and the runs that the last one may be, with a noise that says nothing yet."""
    numbers = range(1, len(search.settings) + 1)
    return [search.trial(number, 1.0, ledgers) for number in numbers], [
        search.last(number, 1.0, ledgers) for number in numbers
    ]


def tune(search: Search, out: Path, command: str, progress: Progress, resume: bool = False) -> SearchSummary:
    """Run all trials and the last run; return the summary.

    Raises `RunFailedError` when the last run or all trials failed, `PrivacyBudgetError` where the search does not fit.
    """
    began, config = time.monotonic(), search.config
    with _search_directory(out, resume) as directory:
        ledgers = config.site.privacy_ledger or directory.absolute() / "privacy"
        ledgers.mkdir(parents=True, exist_ok=True)
        require_weights(config)
        patients_per_hospital(config)  # whatever is wrong with the data is told before a trial is charged
        plan = _Plan.of(search, directory, ledgers, resume)
        for number in range(len(plan.trials) + 1, len(search.settings) + 1):
            trial = _tried(search, number, plan, directory, command, progress)
            plan.trials.append(trial)
            plan.keep(directory)
        best = best_trial(plan.trials)
        if best is None:
            what = f"no trial has an opened validation; the first: {plan.trials[0].failed}"
            raise RunFailedError(what, f"see the trials in {directory / 'trials'}")
        if plan.after_trials is None:
            plan.after_trials = _epsilons(config, ledgers)
            if config.privacy.mechanism != "none":
                plan.last_noise = noise_of_last(search.last(best.number, None, ledgers), _spent(config, ledgers))
            plan.keep(directory)
        last = search.last(best.number, plan.last_noise, ledgers)
        try:
            final = _trained(last, directory / "final", command, progress)
        except RunFailedError as error:
            raise RunFailedError(f"the last run: {error.what}", "go on with --resume: all trials are kept") from None
        after = _epsilons(config, ledgers)
        summary = SearchSummary(
            name=config.name,
            synthetic=config.data.source == "phantoms",
            command=command,
            versions=versions(),
            criterion=config.evaluation.criterion,
            trials=plan.trials,
            chosen=best.number,
            final=final.final,
            calibration=final.calibration,
            mechanism=config.privacy.mechanism,
            epsilon=config.privacy.epsilon,
            delta=config.privacy.delta,
            share=search.share,
            noise_multiplier=plan.noise,
            spent=[SearchSpent(name, plan.after_trials[name], after[name]) for name in after],
            seconds=round(time.monotonic() - began, 2),
        )
        from mpc_fl.apps.report.search_page import write_search_report  # draws: matplotlib comes with it

        write_text(directory / "config.yaml", config.to_yaml())
        write_json(directory / SEARCH_FILE, summary.to_json())
        write_search_report(directory)
        for path in (directory / _PLAN, directory / _LOCK):
            path.unlink()
        directory.rename(out)
    return summary


@dataclass
class _Plan:
    """What a search that goes on must know: what it searches, the noise of its trials and of the last run, and what is done."""

    what: str
    noise: float | None
    trials: list[TrialResult]
    after_trials: dict[str, float | None] | None = None
    last_noise: float | None = None

    @classmethod
    def of(cls, search: Search, directory: Path, ledgers: Path, resume: bool) -> _Plan:
        """A new plan, or the one in the directory. Raises `ConfigError` for that of another search."""
        config = search.config
        settings = json.dumps(config.settings_of_run(), sort_keys=True)
        what = f"{hashlib.sha256(settings.encode()).hexdigest()} {search.settings} {search.share}"
        if resume and (directory / _PLAN).exists():
            plan = read_object(cls, directory, _PLAN)
            if plan.what != what:
                raise ConfigError(f"{directory} is another search", "go on with the configuration and values it had")
            return plan
        trials, last = _runs_of(search, ledgers)  # all are valid, before any begins
        noise = None
        if config.privacy.mechanism != "none":
            noise = noise_of_trials(trials, last, _spent(config, ledgers), search.share)
        plan = cls(what, noise, [])
        plan.keep(directory)
        return plan

    def keep(self, directory: Path) -> None:
        """Write it whole or not at all."""
        write_json(directory / _PLAN, asdict(self))


@contextlib.contextmanager
def _search_directory(out: Path, resume: bool) -> Iterator[Path]:
    """The working directory, held by this process alone; it stays where the search does not come to its end."""
    partial = out.with_name(out.name + ".partial")
    if resume:
        _require_search(out, partial)
    else:
        require_free(out)
    partial.mkdir(parents=True, exist_ok=resume)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{partial} is in use", "wait for the search that works there") from None
        yield partial


def _require_search(out: Path, partial: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists already", "the search is complete; choose another --out for a new one")
    if not (partial / _PLAN).is_file():
        raise ConfigError(f"there is no search to go on with at {partial}", "start it without --resume")


def _tried(search: Search, number: int, plan: _Plan, directory: Path, command: str, progress: Progress) -> TrialResult:
    """One trial, which may have been begun before. One that fails is no end of the search."""
    config = search.trial(number, plan.noise, search.config.site.privacy_ledger or directory.absolute() / "privacy")
    settings, began = _as_text(search.settings[number - 1]), time.monotonic()
    try:
        summary = _trained(config, directory / "trials" / f"trial-{number}", command, progress)
    except RunFailedError as error:
        return TrialResult(number, settings, seconds=round(time.monotonic() - began, 2), failed=str(error))
    found, chosen = summary.validation, summary.chosen
    if found is None:
        failed = "no validation was opened: hospitals were absent"
        return TrialResult(number, settings, seconds=summary.seconds, failed=failed)
    figure = found.accuracy if config.evaluation.criterion == "accuracy" else found.balanced_accuracy
    of = config.training.rounds if chosen is None else chosen.round
    return TrialResult(number, settings, figure, found, of, summary.seconds)


def _trained(config: Config, out: Path, command: str, progress: Progress) -> TrainingSummary:
    """A whole run, or the rest of one that was begun. Raises `RunFailedError`."""
    if out.exists():
        return read_object(TrainingSummary, out, SUMMARY_FILE)
    resume = may_go_on(out)
    if not resume:  # ended before its first round was complete: what it charged is in the ledgers
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    return train(config, out, command, progress, resume)


def _as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in settings.items()}


def _ledgers(config: Config, directory: Path) -> dict[str, PrivacyLedger]:
    names = hospital_names(config.federation.hospitals)
    return {
        name: PrivacyLedger(directory / f"{name}-privacy.sqlite3", name, config.data.counted_unit) for name in names
    }


def _spent(config: Config, directory: Path) -> list[list[SubsampledGaussian]]:
    return [ledger.spent() for ledger in _ledgers(config, directory).values()]


def _epsilons(config: Config, directory: Path) -> dict[str, float | None]:
    """Epsilon of each hospital's patients by its ledger; None where none holds."""
    budget = budget_of(config)
    found = {name: of.epsilon(budget.delta, budget.accountant) for name, of in _ledgers(config, directory).items()}
    none = config.privacy.mechanism == "none"
    return {name: None if none or not math.isfinite(epsilon) else epsilon for name, epsilon in found.items()}
