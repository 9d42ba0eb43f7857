"""`mpc-fl compare`: training runs side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpc_fl.apps.cli.options import AsJson, cell, output_console, print_json, say
from mpc_fl.apps.formats import duration, energy, size

if TYPE_CHECKING:
    from rich.table import Table

_LONGEST = 40  # of a value in a table
_BEFORE = 8  # letters that are shown before the first one that differs


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN_DIR...", help="Directories of finished training runs, or of one party's."),
    ],
    as_json: AsJson = False,
) -> None:
    """Show training runs side by side: results, privacy, and which settings differ.

    Intervals are 95 %, of so many test records. Runs of different test records or noise are not the
    same question: what differs is listed below. Of a run by mpc-fl party each
    party's directory says what that party has; own accuracy is a hospital's,
    on its own test records alone.

    The price of privacy: time, processors, bytes, energy and CO2 of all parties
    together. With a run of `mpc-fl train --central` among them, that of training
    on the same patients in one place stands beside it.
    """
    from mpc_fl.apps.comparing import differing_settings, read_run

    read = [read_run(path) for path in runs]
    differing = differing_settings(read)
    if as_json:
        print_json({"runs": [{"run": run.where, **run.figures()} for run in read], "settings": differing})
        return
    console = output_console()
    console.print(_results([(run.where, run.figures()) for run in read]))
    for run in read:
        if remarks := run.remarks():
            say(f"{run.where}: {'; '.join(remarks)}.")
    if any(run.summary.costs for run in read):
        say("\nThe price of privacy:")
        console.print(_prices([(run.where, run.arrangement, run.figures()) for run in read]))
        say(
            "Energy is estimated but where it says measured (docs/costs.md). Of a party by itself: what that party spent."
        )
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
            interval = (
                f"{of['accuracy']:.1%} ({of['accuracy_low']:.1%} to {of['accuracy_high']:.1%}) of {of['test_records']}"
            )
        own = "" if of["own_accuracy"] is None else f"{of['own_accuracy']:.1%} of {of['own_test_records']}"
        spent = of["mechanism"] is not None  # the aggregator has no patients
        cells = [
            where, *((of["party"] or "all", own) if of_parties else ()), str(of["hospitals"]), str(of["rounds"]),
            f"{of['parameters']:,}", interval, _number(of["balanced_accuracy"], ".1%"), _number(of["auc_macro"], ".3f"),
            _number(of["epsilon"], ".2f", "none" if spent else ""), str(of["mechanism"] or ""), duration(of["seconds"]),
        ]  # fmt: skip
        table.add_row(*map(cell, cells))
    return table


def _prices(runs: list[tuple[str, str, dict[str, Any]]]) -> Table:
    """What runs cost beside what they reached, with how many times the processor seconds of the one that was central."""
    central = [of["processor_seconds"] for _, arrangement, of in runs if arrangement == "central"]
    table = _table("Run", "Trained", "Accuracy", "Time", "Processor", "GPU", "Sent", "Energy", "Known how", "CO2")
    for where, arrangement, of in runs:
        processor, times = of["processor_seconds"], ""
        if len(central) == 1 and central[0] and processor is not None and arrangement != "central":
            times = f" ({processor / central[0]:.1f} x central)"
        cells = [
            where, arrangement, _number(of["accuracy"], ".1%"), duration(of["seconds"]),
            "" if processor is None else duration(processor) + times,
            "not used" if of["gpu_seconds"] is None else duration(of["gpu_seconds"]),
            "" if of["bytes_sent"] is None else size(of["bytes_sent"]), "" if of["joules"] is None else energy(of["joules"]),
            of["energy"] or "", "" if of["grams_co2"] is None else f"{of['grams_co2']:.3g} g",
        ]  # fmt: skip
        table.add_row(*map(cell, cells))
    return table


def _settings(names: list[str], differing: dict[str, list[Any]]) -> Table:
    table = _table("Setting", *names)
    for key, values in differing.items():
        table.add_row(*map(cell, [key, *_shown(values)]))
    return table


def _table(*heads: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(cell(head), overflow="fold")
    return table


def _number(value: float | None, form: str, otherwise: str = "") -> str:
    return otherwise if value is None else format(value, form)


def _shown(values: list[Any]) -> list[str]:
    """Values of one setting as text, of long ones the part where they begin to differ."""
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
    if max(map(len, texts)) <= _LONGEST:
        return texts
    begin = max(0, len(os.path.commonprefix(texts)) - _BEFORE)
    parts = [_part(text, begin) for text in texts]
    return parts if len(set(parts)) == len(set(texts)) else texts


def _part(text: str, begin: int) -> str:
    end = begin + _LONGEST
    return f"{'...' if begin else ''}{text[begin:end]}{'...' if len(text) > end else ''}"
