"""`mpc-fl init`: a first configuration, from a few questions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from mpc_fl.apps.cli.options import AsJson, print_json, say
from mpc_fl.errors import ConfigError

if TYPE_CHECKING:
    from mpc_fl.apps.first_configuration import Answers


def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="New configuration; must not exist.")],
    source: Annotated[str | None, typer.Option(help="Where records come from: phantoms, images or csv.")] = None,
    hospitals: Annotated[int | None, typer.Option(min=2, max=64, help="How many take part.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy of each patient; smaller is more private.")] = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Ask nothing: what is not given has its default.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a few questions and write a first configuration with comments.

    What data there are, of which classes, how many hospitals, how much
    privacy. Enter keeps what stands in brackets. Then look at it with
    mpc-fl check FILE --data DIR.
    """
    from mpc_fl.apps.first_configuration import Answers, first_configuration
    from mpc_fl.config.config import parse_config
    from mpc_fl.config.settings import takes_text
    from mpc_fl.files import write_text
    from mpc_fl.parsing import parse_yaml

    if path.exists():
        raise ConfigError(f"{path} exists already", "choose another name, or move it away")
    given = {"source": source, "hospitals": hospitals, "epsilon": epsilon}
    answers = Answers(**cast(Any, {name: value for name, value in given.items() if value is not None}))
    if answers.source not in ("phantoms", "images", "csv"):
        raise ConfigError(f"mpc-fl init knows no data.source '{answers.source[:60]}'", "phantoms, images or csv")
    if not defaults and not as_json:
        answers = _asked(answers, {name for name, value in given.items() if value is not None})
    text = first_configuration(answers)
    parse_config(parse_yaml(text, takes_text), "these answers")
    write_text(path, text, 0o644)
    if as_json:
        print_json({"configuration": str(path)})
        return
    data = "" if answers.source == "phantoms" else " --data DIR"
    say(f"Written: {path}\nNext: mpc-fl check {path}{data}\n      mpc-fl train {path}{data} --out RUN")


def _asked(known: Answers, given: set[str]) -> Answers:
    """The answers, each asked for that was not given on the command line and matters."""
    from dataclasses import replace

    from mpc_fl.apps.first_configuration import Backbone

    def ask(name: str, question: str, kind: Any, choices: tuple[str, ...] = ()) -> None:
        nonlocal known
        if name in given:
            return
        of = f" ({', '.join(choices)})" if choices else ""
        while True:
            value = typer.prompt(question + of, default=getattr(known, name), type=kind, err=True)
            if not choices or value in choices:
                break
            typer.echo(f"'{value[:60]}' is none of {', '.join(choices)}", err=True)
        known = replace(known, **{name: value})

    ask("source", "Where do records come from?", str, ("phantoms", "images", "csv"))
    if known.source != "phantoms":
        names = typer.prompt("Names of the classes, with commas", default=", ".join(known.classes), err=True)
        known = replace(known, classes=tuple(name.strip() for name in names.split(",")))
    ask("hospitals", "How many hospitals?", int)
    ask("epsilon", "Epsilon for each patient (8: some protection, 1: strong)", float)
    if known.source == "phantoms":
        return known
    ask("smallest_hospital", "Fewest training patients of any hospital (will be public)", int)
    if known.source == "images":
        ask("backbone", "Features of images from", str, get_args(Backbone))
    else:
        names = typer.prompt("Names of the feature columns, with commas", default=", ".join(known.columns), err=True)
        known = replace(known, columns=tuple(name.strip() for name in names.split(",")))
        ask("label_column", "Column that holds the class", str)
        column = typer.prompt("Column that holds the patient (empty: every row counts by itself)", default="", err=True)
        known = replace(known, patient_column=column or None)
    return known
