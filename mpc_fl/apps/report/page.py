"""The report of a finished run: one HTML file without any link to the outside, made from the run's files alone.

Everything read from a run directory is untrusted: text is escaped, figures are images that cannot run code, and the
page forbids itself any outside source. A file that is missing or unreadable costs its section, not the report.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from mpc_fl.apps.report import markup
from mpc_fl.apps.report.common_sections import _configuration, _costs, _openings
from mpc_fl.apps.report.inference_sections import _all_images, _diagnosis, _images
from mpc_fl.apps.report.markup import Markup, escape, paragraph
from mpc_fl.apps.report.run_files import Run, _guarded, _read
from mpc_fl.apps.report.training_sections import (
    _absences,
    _by_class,
    _calibration,
    _global_curve,
    _hospital_curves,
    _privacy,
    _result,
)
from mpc_fl.errors import DataError
from mpc_fl.files import write_text

# ---- reading ---------------------------------------------------------------------------------------------------------


# ---- a training run --------------------------------------------------------------------------------------------------


# ---- an inference run ------------------------------------------------------------------------------------------------


# ---- both kinds of run -----------------------------------------------------------------------------------------------


# ---- the page --------------------------------------------------------------------------------------------------------

_SECTIONS: dict[str, dict[str, tuple[Callable[[Run], Markup], ...]]] = {
    "train": {
        "Result": (_result,),
        "Training curves": (_global_curve, _absences, _hospital_curves),
        "Results by class": (_by_class, _calibration),
        "Privacy": (_privacy,),
    },
    "infer": {"Result": (_diagnosis,), "Each image": (_images,), "All images": (_all_images,)},
}
_SECTIONS["ask"] = _SECTIONS["infer"]  # of a model owner that stays up: only the hospital's files are here
_BOTH = {"What was opened": (_openings,), "Time and bytes": (_costs,), "Configuration": (_configuration,)}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _load(run_dir: Path) -> Run:
    fix = "give the --out of a finished train or infer"
    try:
        summary = json.loads(_read(run_dir, "summary.json"))
        if summary["kind"] not in _SECTIONS:
            raise DataError("summary.json is of an unknown kind")
    except DataError as error:
        raise DataError(f"{run_dir} is not a finished run: {error}", fix) from None
    except (LookupError, TypeError, ValueError):
        raise DataError(f"{run_dir} is not a finished run: summary.json cannot be read", fix) from None
    try:
        config = yaml.safe_load(_read(run_dir, "config.yaml"))
    except (DataError, yaml.YAMLError):
        config = None
    return Run(run_dir, summary, config if isinstance(config, dict) else {})


def _page(run: Run) -> str:
    kind = run.summary["kind"]
    title = escape(
        f"{'Federated training' if kind == 'train' else 'Encrypted diagnosis'}: {run.summary.get('name', '')}"
    )
    banner = paragraph("SYNTHETIC DATA: phantoms, not patients", "banner") if run.summary.get("synthetic") else ""
    contents = main = ""
    for index, (name, builders) in enumerate({**_SECTIONS[kind], **_BOTH}.items()):
        contents += f'<li><a href="#s{index}">{name}</a></li>'
        main += f'<section id="s{index}"><h2>{name}</h2>{"".join(_guarded(b, run) for b in builders)}</section>'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{title}</title>
<style>{markup.STYLE_SHEET}</style></head><body>{banner}<h1>{title}</h1>
<p class="soft">Not a medical device; for research.</p><nav aria-label="Contents"><ol>{contents}</ol></nav>
<main>{main}</main><footer>Written by mpc-fl from the files of this run.</footer></body></html>
"""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a finished run from its files, whole or not at all; return its path.

    The report of an inference shows the hospital's images and is readable by this user only.
    Raises `DataError` when `run_dir` is not a finished run, `MpcFlError` when the report cannot be written.
    """
    run = _load(run_dir)
    path = run_dir / "report.html"
    write_text(path, _page(run), 0o644 if run.summary["kind"] == "train" else 0o600)
    return path
