"""What stands beside an exported model, for machines: what goes in, what comes out, whose it is, which privacy it has. Pure.

Whoever gets the file may have nothing else of the run, so what has to be known to ask it rightly is in words here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mpc_fl.apps.estimates import NoPrivacy, PlannedPrivacy
from mpc_fl.apps.model_card import holds_against, unit_of_privacy
from mpc_fl.audit.model_origin import ModelOrigin
from mpc_fl.config.columns import ColumnSection
from mpc_fl.config.config import Config
from mpc_fl.learning.models.whole_network import TrainedModel

_FORMAT = "mpc-fl exported model 1"
_LOADING = {
    "torch": "torch.export.load({file!r}).module()(input)",
    "onnx": "onnxruntime.InferenceSession({file!r}).run(['logits', 'probabilities'], {{'input': input}})",
}
_SIGNED = {
    True: "all parties of its training signed the SHA-256 of model.safetensors at the end of their reveal ledger",
    False: "nothing was there that shows who trained it",
}
_MISSING = {
    "error": "NaN has no answer",
    "leave_out": "NaN has no answer",
    "fill": "NaN is filled with the value `fill`",
    "indicator": "NaN is marked by a feature of its own",
}
_CENSORED = {
    "error": "a limit like <0.5 has no value",
    "limit": "of <0.5 or >90 give the limit",
    "half": "of <0.5 give half of it, of >90 give 90",
}
_ENCODINGS = {
    "number": "a number in this unit",
    "category": "the place of its category in `categories`, from 0",
    "boolean": "1 for true, 0 for false",
    "date": "years of 365.25 days after `since`, below 0 before it",
}


@dataclass(frozen=True)
class ExportedFile:
    """A file as it was written and checked: by how much answers differ at most, loaded by which engine, on how many records."""

    name: str
    form: str
    sha256: str
    version: str
    difference: float
    engine: str
    records: int


def description(
    config: Config,
    model: TrainedModel,
    file: ExportedFile,
    origin: ModelOrigin,
    privacy: NoPrivacy | PlannedPrivacy,
    origins: dict[str, str],
) -> dict[str, Any]:
    """All of it, ready for JSON. `origins` is what is known of weights that came from elsewhere, as in the model card."""
    calibration = model.calibration
    return {
        "format": _FORMAT,
        "file": file.name,
        "file_format": file.form,
        "sha256": file.sha256,
        "load": _LOADING[file.form].format(file=file.name),
        "name": config.name,
        "network": config.model.architecture,
        "classes": list(config.data.classes),
        "input": _table_input(config) if config.data.is_table else _picture_input(config),
        "outputs": {
            "logits": "float32 (N, classes), in the order of `classes`; the largest is the class. NaN: this input has no answer",
            "probabilities": "float32 (N, classes); softmax of the logits, without class offsets, divided by the temperature",
        },
        "features": None if config.data.features is None else config.data.features.described(),
        "normalisation_of_inputs": None if model.normalisation is None else model.normalisation.to_json(),
        "calibration": None if calibration is None else calibration.to_json(),
        "included": "input, features, normalisation_of_inputs and calibration are in the file: apply none of them again",
        "model": {"sha256": origin.sha256, "signed_by_all_parties": origin.signed, "words": _SIGNED[origin.signed]},
        "configuration": config.digest(),
        "privacy": _privacy(config, privacy),
        "weights_of_others": origins,
        "check": {"records": file.records, "largest_difference": file.difference, "loaded_with": file.engine},
        "mpc_fl": file.version,
        "limits": "Not a medical device; for research. The model card of the run says what was tested and what was not. "
        "Whoever has the file can try it as often as they like.",
    }  # fmt: skip


# ---- inputs ------------------------------------------------------------------------------------------------------------


def _picture_input(config: Config) -> dict[str, Any]:
    data = config.data
    fixed = data.wrong_size == "error"
    squares = {
        "pad": "with black beside what is not square",
        "crop": "from its middle where it is not square",
        "stretch": "distorted where it is not square",
    }
    size = (
        f"{data.image_size} x {data.image_size} pixels and no other size, as in the run (data.wrong_size: error)"
        if fixed
        else f"any height and width; the file itself makes {data.image_size} x {data.image_size} pixels of it, "
        + squares[data.not_square]
    )
    side: list[int | str] = [data.image_size, data.image_size] if fixed else ["height", "width"]
    colour = "Grey: 0 is black, 1 is white" if data.channels == 1 else "Red, green, blue; a grey picture three times"
    return {
        "kind": "pictures",
        "dtype": "float32",
        "shape": ["N", data.channels, *side],
        "range": [0.0, 1.0],
        "words": f"{size}. {colour}. Pixels of 8 bits are divided by 255; of DICOM what its window shows, inverted for MONOCHROME1 "
        "(mpc-fl's docs/data.md). A picture with values outside of 0 to 1 has no answer.",
    }


def _table_input(config: Config) -> dict[str, Any]:
    columns = config.data.table.columns
    described = [_column(column) for column in columns] if columns is not None else _columns_in_order(config)
    return {
        "kind": "rows",
        "dtype": "float32",
        "shape": ["N", len(described)],
        "words": "one number for each of `columns`, in this order; the file itself scales them. NaN is a missing value. "
        "A row with a cell that is none of what its column takes has no answer.",
        "columns": described,
    }


def _column(column: ColumnSection) -> dict[str, Any]:
    found: dict[str, Any] = {"name": column.name, "kind": column.kind, "value": _ENCODINGS[column.kind]}
    if column.kind == "number":
        found |= {"unit": column.unit, "censored": _CENSORED[column.censored]}
    if column.kind == "category":
        found["categories"] = list(column.categories)
    if column.kind == "date":
        found["since"] = column.since
    if column.range is not None:
        found |= {"range": list(column.range), "outside": "cut off at the range"}
    found["missing"] = _MISSING[column.missing]
    return found if column.fill is None else {**found, "fill": column.fill}


def _columns_in_order(config: Config) -> list[dict[str, Any]]:
    """Of a run without `data.table.columns`, where nobody says what columns are called: their order is that of its table."""
    names: list[str | None] = [None] * config.data.input_shape[0]
    if config.data.source == "breast_cancer":
        from sklearn.datasets import load_breast_cancer

        names = [str(name) for name in load_breast_cancer().feature_names]
    ranges = config.data.table.reference_ranges
    return [
        {
            "name": name,
            "kind": "number",
            "value": "a number, in the unit of the run's table",
            "missing": _MISSING["error"],
            **({} if ranges is None else {"range": list(ranges[place]), "outside": "cut off at the range"}),
        }
        for place, name in enumerate(names)
    ]


# ---- privacy -----------------------------------------------------------------------------------------------------------


def _privacy(config: Config, planned: NoPrivacy | PlannedPrivacy) -> dict[str, Any]:
    if isinstance(planned, NoPrivacy):
        return {
            "mechanism": "none",
            "words": "No differential privacy: the model may hold what single patients have that others have not.",
        }
    settings = config.privacy
    figures = {
        name: value for name, value in asdict(planned).items() if name not in ("hospital", "patients", "target_epsilon")
    }
    words = (
        "epsilon and epsilon_with_spare are those of this run alone, at a hospital whose privacy ledger held nothing before; "
        "epsilon_at_most bounds all runs that are charged to one ledger. Where a hospital released data of the same patients "
        "without privacy before, no bound holds for them."
    )
    if config.training.sampling_seed is not None:
        words += " The sampling order came from a fixed seed: no epsilon holds against anyone who knows that seed."
    return {
        "mechanism": settings.mechanism,
        "unit": unit_of_privacy(config),
        "against": holds_against(config),
        "epsilon_at_most": settings.epsilon,
        **figures,
        "accountant": settings.accountant,
        "clipping_norm": settings.clipping_norm,
        "words": words,
    }  # fmt: skip
