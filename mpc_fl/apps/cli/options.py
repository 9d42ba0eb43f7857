"""What the commands share: options, how flags are shown, how a configuration is read, and how results are said.

Texts go to standard output, one JSON object instead with `--json`; progress and errors go to standard error. Libraries are
imported where they are used, so that `mpc-fl --help` waits for none of them.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from mpc_fl.errors import ConfigError, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mpc_fl.chosen_names import ChosenNames
    from mpc_fl.config.config import Config
    from mpc_fl.federation.ledger_forecast import LedgerForecast

WIDTH = 132  # of tables that go to a file

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration, for example configs/demo.yaml")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value; repeatable.")]
DataPath = Annotated[
    Path | None, typer.Option("--data", help="Data: DIR/{train,test}/<class>/, .npz or .csv. Not needed for phantoms.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of text.")]
FromModel = Annotated[
    Path | None,
    typer.Option(
        "--from", metavar="MODEL", help="Begin with the model.safetensors of an earlier run; every party needs it."
    ),
]
LedgerOfModel = Annotated[
    Path | None,
    typer.Option("--ledger", metavar="FILE_OR_RUN", help="Reveal ledger of the model's training. Default: beside it."),
]
AuthorityOfModel = Annotated[
    Path | None,
    typer.Option("--authority", metavar="FILE", help="That federation's certificate. Default: beside the ledger."),
]
Anyway = Annotated[
    bool, typer.Option("--anyway", help="Begin though the privacy ledger is nearly spent and noise will be large.")
]
OutPath = Annotated[Path, typer.Option("--out", help="New directory for the results; must not exist.")]


def _show_flags_as_flags(parameters: list[Any]) -> list[Any]:
    """The same parameters of a command: help then shows `--json`, not `--json <bool>`."""
    for parameter in parameters:
        if isinstance(parameter, TyperOption) and parameter.is_flag:
            parameter.metavar = ""
    return parameters


class Command(TyperCommand):
    """A command whose help shows flags as flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its options and arguments, `--help` included."""
        return _show_flags_as_flags(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands whose help shows flags as flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own options, `--help` included."""
        return _show_flags_as_flags(super().get_params(ctx))


def configure(path: Path, overrides: list[str] | None, begin_with: Path | None = None, **site: Path | None) -> Config:
    """The configuration in a file with values of the command line over it, `site` those of the section of that name.

    `begin_with` is a model of an earlier run, which is brought into the store of weights. Raises `ConfigError`, and `ModelError`
    for a file that is none.
    """
    from mpc_fl.config.loading import load_config

    if begin_with is None:
        config = load_config(path, overrides)
    else:
        from mpc_fl.learning.models.weights_store import model_digest, store_model

        config = load_config(path, overrides, model_digest(begin_with))
        store_model(begin_with, config.site.weights)
    if site.get("data") is not None and config.data.source in ("phantoms", "breast_cancer"):
        raise ConfigError(
            f"{path}: data.source {config.data.source} is embedded, so --data would be passed over",
            "leave out --data, or set data.source to images",
        )
    given = {name: str(value.absolute()) for name, value in site.items() if value is not None}
    return config.with_values(site=given) if given else config


def command_line() -> str:
    """The command that this process was called with, for a shell."""
    return shlex.join(["mpc-fl", *sys.argv[1:]])


def print_json(value: Any) -> None:
    """One JSON object on one line, NaN as null."""
    from mpc_fl.files import finite

    say(json.dumps(finite(value), allow_nan=False))


def say(text: str) -> None:
    """One text to standard output, at once: a command that stays is read as it goes.

    Names of files, patients and classes come from others: what would move the cursor of a terminal is shown as `?`.
    """
    sys.stdout.write("".join(letter if letter.isprintable() or letter in "\n\t" else "?" for letter in text) + "\n")
    sys.stdout.flush()


def say_beside(text: str, as_json: bool) -> None:
    """One text for a person: on standard output, or beside JSON on standard error."""
    if as_json:
        error_console().print(printable(text, len(text)), markup=False)
    else:
        say(text)


def begin_on_ledgers(
    forecasts: Sequence[LedgerForecast], names: ChosenNames, anyway: bool, as_json: bool
) -> list[dict[str, Any]]:
    """Before a run: say what privacy ledgers leave for it; return the same for JSON.

    Raises `PrivacyBudgetError` where one is nearly spent and nobody said --anyway.
    """
    for forecast in forecasts:
        if not anyway:
            forecast.require_worth()
    for forecast in forecasts:
        say_beside(names.in_text(f"{forecast.described}."), as_json)
    return [forecast.to_json() for forecast in forecasts]


def cell(text: str) -> Text:
    """A cell or heading of a table, in which nothing is markup or moves the cursor of a terminal."""
    from rich.text import Text

    return Text(printable(text, len(text)))


def error_console() -> Console:
    """Standard error, in colour where it is a terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_table(table: Table) -> None:
    """A table, as wide as the terminal or, in a file, `WIDTH`."""
    output_console().print(table)


def output_console() -> Console:
    """Standard output, as wide as the terminal or, in a file, `WIDTH`."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def say_skipped(files: int | None) -> None:
    """How many files could not be read; nothing where all could."""
    if files:
        say(f"Unreadable files left out: {files}; the logs of the hospitals name them.")


def earlier_failure_of(out: Path) -> dict[str, str]:
    """Of a run that is complete: where an earlier one of its name that failed still lies, for JSON; empty where there is none."""
    from mpc_fl.apps.runs.run_directory import earlier_failure

    failed = earlier_failure(out)
    return {} if failed is None else {"earlier_failure": str(failed)}


def say_earlier_failure(out: Path) -> None:
    """The same for people, with how to remove it: what it revealed and spent is not removed unasked."""
    for failed in earlier_failure_of(out).values():
        say(
            f"A run that failed before this one is still at {failed}, with its logs and what it revealed and spent. If none of "
            f"it is needed: rm -r {shlex.quote(failed)}"
        )


def privacy_words(epsilon: float | None, noise_multiplier: float | None) -> str:
    """The privacy of a hospital's patients, to follow another text."""
    if epsilon is None:
        return ", no differential privacy"
    return f", epsilon {epsilon:.2f} with noise multiplier {noise_multiplier:.3f}"
