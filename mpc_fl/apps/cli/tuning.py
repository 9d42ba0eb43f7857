"""`mpc-fl tune`: hospitals on this machine try settings, each trial charged, and train with the best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpc_fl.apps.cli.options import (
    Anyway,
    AsJson,
    ConfigPath,
    DataPath,
    OutPath,
    Overrides,
    begin_on_ledgers,
    cell,
    command_line,
    configure,
    print_json,
    print_table,
    say,
)
from mpc_fl.apps.cli.progress import shown_progress
from mpc_fl.errors import ConfigError

if TYPE_CHECKING:
    from mpc_fl.apps.search_summary import SearchSummary


def tune(
    config: ConfigPath,
    out: OutPath,
    tries: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="A.B=X,Y", help="Values to try of a key; repeatable: all combinations."),
    ] = None,
    grid: Annotated[Path | None, typer.Option(help="YAML file with a list of values for each key.")] = None,
    share: Annotated[
        float | None,
        typer.Option(min=0.01, max=0.99, help="Share of the budget for all trials; by default divided equally."),
    ] = None,
    data: DataPath = None,
    overrides: Overrides = None,
    ledger: Annotated[Path | None, typer.Option(help="Directory of privacy ledgers that outlive this search.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search that was ended at --out.")] = False,
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Try settings of training, each as a run on this machine, compare them by validation, train and test with the best.

    All trials and the last run together stay within privacy.epsilon: every one is charged to the same privacy ledgers.
    Writes tune.json, report.html, the trials and the last run, in final/, to --out.
    """
    settings = configure(config, overrides, data=data, privacy_ledger=ledger)
    from mpc_fl.apps.runs.search import ledger_forecasts, searched
    from mpc_fl.apps.runs.search import tune as run_search

    search = searched(settings, _grid(tries, grid), share)
    forecasts = [] if resume else ledger_forecasts(search)
    ledgers = begin_on_ledgers(forecasts, settings.federation.chosen_names, anyway, as_json)
    with shown_progress(settings.federation.chosen_names) as progress:
        summary = run_search(search, out, command_line(), progress, resume)
    if as_json:
        print_json({**summary.to_json(), "ledgers": ledgers, "report": str(out / "report.html")})
        return
    _say_search(summary)
    say(f"Model:  {out / 'final' / 'model.safetensors'}\nReport: {out / 'report.html'}")


def _grid(tries: list[str] | None, path: Path | None) -> dict[str, list[object]]:
    """Values by key, of the file and of the command line. Raises `ConfigError`."""
    from mpc_fl.apps.runs.search import grid_of, grid_setting
    from mpc_fl.parsing import parse_yaml

    found: dict[str, list[object]] = {}
    if path is not None:
        try:
            found = grid_of(parse_yaml(path.read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError):
            raise ConfigError(f"cannot read the grid {path}", "give a YAML file with lists of values by key") from None
    for text in tries or []:
        key, values = grid_setting(text)
        if key in found:
            raise ConfigError(f"'{key}' is given twice", "give all values of a key at once")
        found[key] = values
    return found


def _say_search(summary: SearchSummary) -> None:
    from rich.table import Table

    if summary.synthetic:
        say("Data: SYNTHETIC phantoms, not patients.")
    table = Table("Trial", "Settings", f"Validation {summary.criterion.replace('_', ' ')}", "Round", "")
    for trial in summary.trials:
        settings = ", ".join(f"{key}={value}" for key, value in trial.settings.items())
        figure = "n/a" if trial.figure is None else f"{trial.figure:.1%}"
        note = trial.failed or ("chosen" if trial.number == summary.chosen else "")
        table.add_row(*map(cell, (str(trial.number), settings, figure, str(trial.round or "n/a"), note)))
    print_table(table)
    if summary.final is not None:
        final = summary.final
        say(
            f"The last run, with the settings of trial {summary.chosen}: accuracy {final.accuracy:.1%} (95 % interval "
            f"{final.accuracy_low:.1%} to {final.accuracy_high:.1%}) on test patients."
        )
    for spent in summary.spent:
        if spent.after_all is None:
            say(f"{spent.hospital}: NO differential privacy.")
            continue
        say(
            f"{spent.hospital}: epsilon {spent.after_all:.3f} of {summary.epsilon:g} at delta {summary.delta:g} for all that was "
            f"opened, {spent.after_trials or 0.0:.3f} of it by the trials."
        )
