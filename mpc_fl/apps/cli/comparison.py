"""`mpc-fl compare`: training runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpc_fl.apps.cli.options import AsJson, cell, output_console, print_json, say
from mpc_fl.apps.formats import duration

if TYPE_CHECKING:
    from rich.table import Table

_LONGEST = 40  # of a value in a table


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR...", help="Directories of finished training runs, or of one party's."),
    ],
    as_json: AsJson = False,
) -> None:
    """Show training runs side by side: results, privacy, and which settings differ.

    Intervals are 95 %. Runs of different test records or noise are not the
    same question: what differs is listed below. Of a run by mpc-fl party each
    party's directory says what that party has; own accuracy is a hospital's,
    on its own test records alone.
    """
    from mpc_fl.apps.comparing import differing_settings, read_run

    read = [read_run(path) for path in runs]
    differing = differing_settings(read)
    if as_json:
        print_json({"runs": [{"run": run.where, **run.figures()} for run in read], "settings": differing})
        return
    console = output_console()
    console.print(_results([(run.where, run.figures()) for run in read]))
    if differing:
        say("")
        console.print(_settings([run.where for run in read], differing))
    elif len(read) > 1:
        say("\nNo setting differs.")


def _results(runs: list[tuple[str, dict[str, Any]]]) -> Table:
    of_parties = any(of["party"] is not None for _, of in runs)
    table = _table(
        "Run", *(("At", "Own accuracy") if of_parties else ()), "Hospitals", "Rounds", "Parameters", "Accuracy", "Balanced",
        "AUC", "Epsilon", "Mechanism", "Time",
    )  # fmt: skip
    for where, of in runs:
        interval = ""
        if of["accuracy"] is not None:
            interval = f"{of['accuracy']:.1%} ({of['accuracy_low']:.1%} to {of['accuracy_high']:.1%})"
        own = "" if of["own_accuracy"] is None else f"{of['own_accuracy']:.1%} of {of['own_test_records']}"
        spent = of["mechanism"] is not None  # the aggregator has no patients
        cells = [
            where, *((of["party"] or "all", own) if of_parties else ()), str(of["hospitals"]), str(of["rounds"]),
            f"{of['parameters']:,}", interval, _number(of["balanced_accuracy"], ".1%"), _number(of["auc_macro"], ".3f"),
            _number(of["epsilon"], ".2f", "none" if spent else ""), str(of["mechanism"] or ""), duration(of["seconds"]),
        ]  # fmt: skip
        table.add_row(*map(cell, cells))
    return table


def _settings(names: list[str], differing: dict[str, list[Any]]) -> Table:
    table = _table("Setting", *names)
    for key, values in differing.items():
        table.add_row(*map(cell, [key, *(_shown(value) for value in values)]))
    return table


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(cell(head), overflow="fold")
    return table


def _number(value: float | None, form: str, otherwise: str = "") -> str:
    return otherwise if value is None else format(value, form)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
