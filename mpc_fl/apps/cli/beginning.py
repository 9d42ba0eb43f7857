"""`mpc-fl init`: a first configuration, from a few questions and what lies in somebody's folder or table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from mpc_fl.apps.cli.options import AsJson, print_json, say
from mpc_fl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mpc_fl.apps.first_configuration import Answers


def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="New configuration.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Guess from what lies here: DIR/{train,test}/<class>/ or a .csv of one hospital."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Where records come from: phantoms, images or csv.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Names of all classes, with commas; a hospital may lack some.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column of a table that holds the class.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of a table that become features, with commas; others are never read.")
    ] = None,
    patient: Annotated[
        str | None, typer.Option(help="Column of a table that holds the patient; '': every row counts by itself.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="What gives the features of images: efficientnet_lite0, scattering or none.")
    ] = None,
    hospitals: Annotated[int | None, typer.Option(min=2, max=64, help="How many take part.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Privacy of each patient; smaller is more private.")] = None,
    smallest_hospital: Annotated[
        int | None, typer.Option(min=1, help="Fewest training patients of any hospital; will be public.")
    ] = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Ask nothing: what is not given has its default.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over FILE where it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Ask a few questions and write a first configuration with comments.

    What data there are, of which classes, how many hospitals, how much
    privacy. Enter keeps what stands in brackets. With --data classes,
    columns and what these hold are guessed from one hospital's folder or
    table: look them over, since all hospitals share them. Then look at it
    with mpc-fl check FILE --data DIR.
    """
    from mpc_fl.apps.first_configuration import Answers, first_configuration
    from mpc_fl.config.config import parse_config
    from mpc_fl.config.settings import takes_text
    from mpc_fl.files import write_text
    from mpc_fl.parsing import parse_yaml

    if path.is_dir() or (path.exists() and not force):
        what = "is a folder" if path.is_dir() else "exists already"
        raise ConfigError(f"{path} {what}", "choose another name" + ("" if path.is_dir() else ", or give --force"))
    given = {
        "name": path.stem,
        "source": _source(source, data),
        "classes": None if classes is None else _names(classes),
        "label_column": label,
        "columns": None if columns is None else _names(columns),
        "backbone": features,
        "hospitals": hospitals,
        "epsilon": epsilon,
        "smallest_hospital": smallest_hospital,
    }
    said: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if patient is not None:
        said["patient_column"] = patient or None
    answers = Answers(**cast(Any, said))
    _require_known(answers)
    answers, found = _with_data(answers, data, set(said))
    if not defaults and not as_json:
        answers = _asked(answers, set(said), data)
    elif len(answers.classes) < 2:
        raise ConfigError(f"{data} has fewer than two classes", "name all that the federation has with --classes")
    elif "smallest_hospital" not in said:
        answers = _with_patients(answers, data)
    answers = _with_sizes(answers, data)
    text = first_configuration(answers)
    parse_config(parse_yaml(text, takes_text), "these answers")
    write_text(path, text, 0o644)
    if as_json:
        print_json({"configuration": str(path), **({} if data is None else {"found": found})})
        return
    where = "" if answers.source == "phantoms" else f" --data {'DIR' if data is None else data}"
    say(f"Written: {path}\nNext: mpc-fl check {path}{where}\n      mpc-fl train {path}{where} --out RUN")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _require_known(answers: Answers) -> None:
    """Raise `ConfigError` for a source or features that init knows nothing of."""
    from mpc_fl.apps.first_configuration import Backbone, Source

    for what, value, known in (
        ("data.source", answers.source, get_args(Source)),
        ("features", answers.backbone, get_args(Backbone)),
    ):
        if value not in known:
            raise ConfigError(f"mpc-fl init knows no {what} '{value[:60]}'", f"give one of {', '.join(known)}")


def _prompt(question: str, default: Any, kind: Any = None) -> Any:
    """What somebody answers. Raises `ConfigError` where nobody is there to."""
    try:
        return typer.prompt(question, default=default, type=kind, err=True)
    except typer.Abort as error:
        if not isinstance(error.__context__, EOFError):
            raise
        typer.echo(err=True)  # the line of the question
        raise ConfigError(
            "mpc-fl init asks questions, and standard input has no more answers; nothing was written",
            "give --defaults, or an option for each (mpc-fl init --help)",
        ) from None


def _source(source: str | None, data: Path | None) -> str | None:
    """Where records come from, as it was said, else by what `data` is. Raises `ConfigError` where these do not fit."""
    if data is None:
        return source
    if not data.exists():
        raise ConfigError(f"{data} does not exist", "give a hospital's folder or CSV file with --data")
    if data.is_file() and data.suffix.lower() == ".npz":
        raise ConfigError("mpc-fl init does not look into .npz files", "give a folder of images, or a CSV file")
    kind = "images" if data.is_dir() else "csv"
    if source not in (None, kind):
        raise ConfigError(f"{data} is looked at as {kind}, not as {source}", "leave out --source, or --data")
    return kind


def _with_data(answers: Answers, data: Path | None, given: set[str]) -> tuple[Answers, dict[str, Any]]:
    """The answers with what lies at `data`, and that in words. Raises `DataError`, `ConfigError` for a table without classes."""
    if data is None:
        return answers, {}
    from mpc_fl.apps.found_data import with_films, with_table
    from mpc_fl.learning.data.first_look import look_at_films, look_at_table

    if answers.source == "images":
        films = look_at_films(data)
        found = {"classes": films.classes, "files": films.kinds, "patients_from": films.patients_from}
        return with_films(answers, films, given), found
    table = look_at_table(data, answers.label_column if "label_column" in given else None)
    if table.label_column is None:
        raise ConfigError(f"no column of {data} is called like a class", "say which it is with --label")
    kinds = {column.name: column.kind for column in table.columns}
    said = {"classes": table.classes, "label": table.label_column, "patient": table.patient_column, "columns": kinds}
    return with_table(answers, table, given), {**said, "left_out": table.left_out}


def _with_sizes(answers: Answers, data: Path | None) -> Answers:
    """The answers with what becomes of the films at `data` at the size that was chosen."""
    if data is None or answers.source != "images":
        return answers
    from mpc_fl.apps.found_data import with_sizes
    from mpc_fl.learning.data.first_look import look_at_films

    return with_sizes(answers, look_at_films(data))


def _with_patients(answers: Answers, data: Path | None) -> Answers:
    """The answers with numbers of patients by those at `data`; as they were where these cannot be told yet."""
    if data is None:
        return answers
    from mpc_fl.apps.first_configuration import first_configuration
    from mpc_fl.apps.found_data import with_patients
    from mpc_fl.config.config import parse_config
    from mpc_fl.config.settings import takes_text
    from mpc_fl.learning.data.loading import records_per_hospital
    from mpc_fl.parsing import parse_yaml

    config = parse_config(parse_yaml(first_configuration(answers), takes_text), "these answers")
    try:
        index, (rows,) = records_per_hospital(
            config.with_values(site={"data": str(data), "data_of": "hospital"}), "train"
        )
    except DataError:  # whose films they are is to be said first, or a column to be looked over: check names it
        return answers
    return with_patients(answers, len({index.patients[row] for row in rows}))


def _asked(known: Answers, given: set[str], data: Path | None) -> Answers:
    """The answers, each asked for that was not given on the command line, or by the data there, and matters."""
    from dataclasses import replace

    from mpc_fl.apps.first_configuration import Backbone

    def ask(name: str, question: str, kind: Any, choices: tuple[str, ...] = ()) -> None:
        nonlocal known
        if name in given:
            return
        of = f" ({', '.join(choices)})" if choices else ""
        while True:
            value = _prompt(question + of, getattr(known, name), kind)
            if not choices or value in choices:
                break
            typer.echo(f"'{value[:60]}' is none of {', '.join(choices)}", err=True)
        known = replace(known, **{name: value})

    def names_for(question: str, default: tuple[str, ...]) -> tuple[str, ...]:
        shown = ", ".join(default)  # kept as it is: a folder may have a comma in its name
        names = _prompt(f"{question}, with commas", shown)
        return default if names == shown else _names(names)

    ask("source", "Where do records come from?", str, ("phantoms", "images", "csv"))
    if known.source != "phantoms" and "classes" not in given:
        known = replace(known, classes=names_for("Names of the classes", known.classes))
    ask("hospitals", "How many hospitals?", int)
    ask("epsilon", "Epsilon for each patient (8: some protection, 1: strong)", float)
    if known.source == "phantoms":
        return known
    if "smallest_hospital" not in given:
        known = counted = _with_patients(known, data)
        ask("smallest_hospital", "Fewest training patients of any hospital (will be public)", int)
        if known.smallest_hospital != counted.smallest_hospital:
            known = replace(known, largest_hospital=None, shared_out=False)
    if known.source == "images":
        ask("backbone", "Features of images from", str, get_args(Backbone))
        return known
    if "columns" not in given:
        known = replace(known, columns=names_for("Names of the feature columns", known.columns))
    if data is None:
        ask("label_column", "Column that holds the class", str)
    if "patient_column" in given:
        return known
    question = "Column that holds the patient (empty: every row counts by itself)"
    return replace(known, patient_column=_prompt(question, known.patient_column or "") or None)
