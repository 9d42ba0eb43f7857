"""options"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config

errors = Console(stderr=True, highlight=False)


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration, for example configs/demo.yaml")]


Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value; repeatable.")]


DataPath = Annotated[
    Path | None, typer.Option("--data", help="Data: DIR/{train,test}/<class>/, .npz or .csv. Not needed for phantoms.")
]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines instead of text.")]


OutPath = Annotated[Path, typer.Option("--out", help="New directory for the results; must not exist.")]


def configure(path: Path, overrides: list[str] | None, **site: Path | None) -> Config:
    config = load_config(path, overrides)
    given = {name: str(value.absolute()) for name, value in site.items() if value is not None}
    return config.with_values(site=given) if given else config


def command_line() -> str:
    return shlex.join(["mpc-fl", *sys.argv[1:]])


def print_json(value: Any) -> None:
    from mpc_fl.files import finite

    sys.stdout.write(json.dumps(finite(value), allow_nan=False) + "\n")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


@contextmanager
def progress_bars() -> Iterator[Callable[[str, str, int, int], None]]:
    """One progress bar per phase; each party's part of it adds up. Nothing is drawn before the first step."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=errors, transient=False)
    tasks: dict[str, TaskID] = {}
    states: dict[str, dict[str, tuple[int, int]]] = {}

    def progress(party: str, phase: str, done: int, total: int) -> None:
        bars.start()
        states.setdefault(phase, {})[party] = (done, total)
        if phase not in tasks:
            tasks[phase] = bars.add_task(phase)
        parts = states[phase].values()
        bars.update(tasks[phase], completed=sum(p[0] for p in parts), total=sum(p[1] for p in parts))

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


def gigabytes(estimate: dict[str, Any], who: str) -> str:
    return f"about {estimate[f'memory_bytes_per_{who}'] / 1e9:.1f} GB"


def say_skipped(summary: dict[str, Any]) -> None:
    if summary["skipped_files"]:
        say(f"Unreadable files left out: {summary['skipped_files']}; the logs of the hospitals name them.")


def privacy_words(line: dict[str, Any]) -> str:
    if line["epsilon"] is None:
        return ", no differential privacy"
    return f", epsilon {line['epsilon']:.2f} with noise multiplier {line['noise_multiplier']:.3f}"
