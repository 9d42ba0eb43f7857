"""A trained model as one file that loads without this program, with a description beside it.

The file appears when it has been loaded by a fresh interpreter and gave the model's answers there, with its description or not at
all. Whoever has it has the model: this is for an owner who gives it away, not for one who answers with `mpc-fl serve`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

import mpc_fl
from mpc_fl.apps.estimates import NoPrivacy, PlannedPrivacy
from mpc_fl.apps.export_description import ExportedFile, description
from mpc_fl.apps.runs.export_check import (
    LARGEST_DIFFERENCE,
    answers_of_file,
    engine_of,
    largest_difference,
    questions,
)
from mpc_fl.apps.runs.export_formats import SUFFIXES, Format, exported, require_format
from mpc_fl.apps.runs.model_card_file import configuration_beside, origins_of, privacy_of_run
from mpc_fl.audit.model_origin import MODEL_FILE, ModelOrigin, model_origin
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.errors import ConfigError, ModelError
from mpc_fl.files import write_json, written_whole
from mpc_fl.learning.models.whole_network import TrainedModel, WholeNetwork


@dataclass(frozen=True)
class Exported:
    """What was written: the file and its description, what is known of the model, and what the check found."""

    path: Path
    description: Path
    origin: ModelOrigin
    privacy: NoPrivacy | PlannedPrivacy
    file: ExportedFile


@dataclass(frozen=True)
class Order:
    """What to export: a run's or a party's directory, or the model file in one, as which format, to where.

    `out` is by default beside the model. `config`, `ledger` and `authority` are the run's where they are not there, `overrides`
    values of `site`.
    """

    run: Path
    form: Format = "torch"
    out: Path | None = None
    force: bool = False
    config: Path | None = None
    ledger: Path | None = None
    authority: Path | None = None
    overrides: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        """The model file."""
        return self.run / MODEL_FILE if self.run.is_dir() else self.run

    @property
    def path(self) -> Path:
        """The file that is to be."""
        return self.model.with_name(f"model{SUFFIXES[self.form]}") if self.out is None else self.out

    @property
    def description(self) -> Path:
        """The description beside it: a name of its own for each format."""
        return self.path.with_name(f"{self.path.name}.json")


def export(order: Order) -> Exported:
    """Export a model, check the file, and write it with its description.

    Raises `ConfigError` for a place that is taken, packages that are not installed and settings other than of `site`; `ModelError`
    for a model that is not there, not the one that was signed, or that such a file cannot hold.
    """
    require_format(order.form)
    _require_free(order)
    origin = model_origin(
        order.model, order.ledger, order.authority
    )  # refuses another file than the one that was signed
    config = _configuration(order)
    model = TrainedModel.read(order.model, config)
    asked = questions(config)
    expected = [torch.stack(model.answers(question.records)) for question in asked]
    inputs = [question.inputs for question in asked]
    content = exported(WholeNetwork(model), order.form, inputs[0], _free_axes(config))
    classes = len(config.data.classes)
    with written_whole(order.description) as described, written_whole(order.path) as temporary:
        temporary.write_bytes(content)
        engine = engine_of(order.form)
        found = answers_of_file(temporary, engine, [*inputs, inputs[0][:1]], classes)  # and one record alone
        pairs = zip(found, [*expected, expected[0][:, :1]], strict=True)
        difference = max(largest_difference(answer, own) for answer, own in pairs)
        if not difference <= LARGEST_DIFFERENCE:
            raise ModelError(
                f"the exported file differs from the model by {difference:.2g} in a logit or probability, more than "
                f"{LARGEST_DIFFERENCE:g}; nothing was written",
                "try another --format, and tell the authors of mpc-fl",
            )
        file = ExportedFile(
            order.path.name, order.form, hashlib.sha256(content).hexdigest(), mpc_fl.__version__, difference, engine,
            sum(map(len, inputs)),
        )  # fmt: skip
        privacy, origins = privacy_of_run(config), origins_of(config)
        write_json(described, description(config, model, file, origin, privacy, origins))
    return Exported(order.path, order.description, origin, privacy, file)


def _configuration(order: Order) -> Config:
    """The run's own; a model trained with other settings would be another one. Raises `ConfigError`, `ModelError`."""
    for setting in order.overrides:
        if not setting.strip().startswith("site."):
            raise ConfigError(
                f"--set {setting[:60]!r}: a model is exported with the settings it was trained with", "set `site` alone"
            )
    return load_config(configuration_beside(order.model.parent, order.config), list(order.overrides))


def _free_axes(config: Config) -> dict[int, str]:
    """Axes of inputs that may have any length."""
    resizes = not config.data.is_table and config.data.wrong_size == "resize"
    return {0: "batch", **({2: "height", 3: "width"} if resizes else {})}


def _require_free(order: Order) -> None:
    """Raise `ConfigError` where something stands already, or where no file can."""
    if order.path.name in ("", MODEL_FILE) or order.path.is_dir():
        raise ConfigError(
            f"--out {order.path} cannot be the exported file", f"name one like model{SUFFIXES[order.form]}"
        )
    for path in (order.path, order.description):
        if path.is_dir() or (not order.force and (path.exists() or path.is_symlink())):
            raise ConfigError(f"{path} exists already", "choose another --out, or give --force to write it anew")
