"""The report of a search over settings: its trials, what they were compared by, what was chosen, what all of it has cost."""

from __future__ import annotations

from pathlib import Path

from mpc_fl.apps.formats import duration, percent, plain
from mpc_fl.apps.report.common_sections import made_by
from mpc_fl.apps.report.markup import Markup, escape, paragraph, table, tiles
from mpc_fl.apps.report.page import document
from mpc_fl.apps.rows import read_object, read_text
from mpc_fl.apps.search_summary import SEARCH_FILE, SearchSummary, TrialResult
from mpc_fl.files import write_text


def _settings(trial: TrialResult) -> str:
    return ", ".join(f"{key}={value}" for key, value in trial.settings.items())


def _result(summary: SearchSummary) -> Markup:
    final, chosen = summary.final, next(trial for trial in summary.trials if trial.number == summary.chosen)
    facts: list[tuple[str, object, str]] = [
        ("Chosen", f"trial {summary.chosen}", _settings(chosen)),
        ("Trials", len(summary.trials), f"compared by validation {summary.criterion.replace('_', ' ')}"),
        ("Time", duration(summary.seconds), "since the search was started, or gone on with"),
    ]
    if final is not None:
        interval = f"95 % interval {percent(final.accuracy_low)} to {percent(final.accuracy_high)}"
        facts.insert(1, ("Accuracy of the last run", percent(final.accuracy), f"{interval}; on test patients"))
    text = """The last run was trained anew with the settings of the chosen trial. Test patients were asked about it alone; the
    best figure of several trials is too high by chance, so it is no estimate of anything. The run and its report are in final/."""
    return Markup(tiles(facts) + paragraph(text))


def _trials(summary: SearchSummary) -> Markup:
    rows = []
    for trial in summary.trials:
        found = trial.validation
        noise = "n/a" if found is None or found.noise is None else f"{found.noise:.1f}"
        counted = "n/a" if found is None else found.records
        note = trial.failed or ("chosen" if trial.number == summary.chosen else "")
        rows.append((trial.number, _settings(trial), note, percent(trial.figure), trial.round or "n/a", counted, noise))
    head = ("Trial", "Settings", "", f"Validation {summary.criterion.replace('_', ' ')}", "Round", "Counted", "Noise")
    text = """Noise: standard deviation of each count of the confusion matrix that was opened. Trials whose figures differ by
    less than noise and chance make were not told apart."""
    return Markup(table(text, head, rows, 4))


def _privacy(summary: SearchSummary) -> Markup:
    if summary.mechanism == "none":
        return paragraph("No differential privacy: updates carry no noise, and no epsilon holds.", "warning")
    share = (
        "divided equally among trials and last run" if summary.share is None else f"{summary.share:.0%} for the trials"
    )
    text = f"""Epsilon is that of everything that was opened: of all trials, their validations, and the last run, by each hospital's
    privacy ledger. What a trial cost is not saved by not choosing it. The budget of {summary.epsilon:g} was {share}; all
    trials had noise multiplier {plain(summary.noise_multiplier, ".4g")}."""
    rows = [
        (of.hospital, plain(of.after_trials, ".4g"), plain(of.after_all, ".4g"), f"{summary.delta:g}")
        for of in summary.spent
    ]
    return Markup(
        paragraph(text) + table("Spent", ("Hospital", "After the trials", "After the last run", "Delta"), rows, 3)
    )


def _configuration(summary: SearchSummary, directory: Path) -> Markup:
    return Markup(
        made_by(summary.command, summary.versions)
        + f"<details><summary>Configuration without the searched values (config.yaml)</summary>"
        f"<pre>{escape(read_text(directory, 'config.yaml'))}</pre></details>"
    )


def write_search_report(directory: Path) -> Path:
    """Write `report.html` of a search from its tune.json, whole or not at all. Raises `DataError` where that is damaged."""
    summary = read_object(SearchSummary, directory, SEARCH_FILE)
    sections = {
        "Result": _result(summary),
        "Trials": _trials(summary),
        "Privacy": _privacy(summary),
        "Configuration": _configuration(summary, directory),
    }
    path = directory / "report.html"
    write_text(path, document(f"Search over settings: {summary.name}", summary.synthetic, sections))
    return path
