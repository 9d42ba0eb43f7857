"""The report of a finished run: one HTML file without any link to the outside, made from the run's files alone.

Everything read from a run directory is untrusted: text is escaped, figures are images that cannot run code, and the
page forbids itself any outside source. A file that is missing or unreadable costs its section, not the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mpc_fl.apps.report import common_sections, group_sections, inference_sections, party_sections, training_sections
from mpc_fl.apps.report.markup import STYLE_SHEET, Markup, escape, paragraph
from mpc_fl.apps.report.run_files import Run, guarded
from mpc_fl.apps.rows import read_text
from mpc_fl.apps.summaries import SUMMARY_FILE, parse_summary
from mpc_fl.errors import DataError
from mpc_fl.files import write_text
from mpc_fl.parsing import parse_yaml
from mpc_fl.roles import is_hospital

_CONFIGURATION = "Configuration"
_Sections = dict[str, tuple[Callable[[Run], Markup], ...]]
_TRAINING: _Sections = {
    "Result": (training_sections.result, training_sections.choice, training_sections.images),
    "Training curves": (
        training_sections.global_curve,
        training_sections.absences,
        training_sections.hospital_curves,
    ),
    "Results by class": (training_sections.by_class, training_sections.calibration),
    "Groups of patients": (group_sections.groups,),
    "Own models": (group_sections.own_models,),
    "Privacy": (training_sections.privacy,),
}
_CENTRAL: _Sections = {
    "Result": (training_sections.result, training_sections.images),
    "Training curves": (training_sections.global_curve,),
    "Results by class": (training_sections.by_class, training_sections.calibration),
    "Time, bytes and energy": (common_sections.costs,),
    _CONFIGURATION: (common_sections.configuration,),
}
_AGGREGATOR: _Sections = {
    "Result": (party_sections.result,),
    "Training curves": (training_sections.global_curve, training_sections.absences),
    "Results by class": (training_sections.by_class, training_sections.calibration),
    "Groups of patients": (group_sections.groups,),
}
_HOSPITAL: _Sections = {
    "Result": (party_sections.result, party_sections.counts, training_sections.images),
    "Training curves": (training_sections.hospital_curves,),
    "Groups of patients": (group_sections.groups,),
    "Own models": (group_sections.own_models,),
    "Privacy": (training_sections.privacy,),
}
_DIAGNOSIS: _Sections = {
    "Result": (inference_sections.diagnosis,),
    "Each image": (inference_sections.images,),
    "All images": (inference_sections.all_images,),
}
_BOTH: _Sections = {
    "What was opened": (common_sections.openings,),
    "Time, bytes and energy": (common_sections.costs,),
    _CONFIGURATION: (common_sections.configuration,),
}
_SIMULATED = "SIMULATED: hospitals of one researcher, masks in place, no signatures, nobody was protected from anybody"
_AT_ONE_PLACE = "CENTRAL: the patients of all hospitals in one place, nobody was protected from anybody"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _load(run_dir: Path) -> Run:
    try:
        header, content = parse_summary(read_text(run_dir, SUMMARY_FILE))
    except DataError as error:
        raise DataError(
            f"{run_dir} is not a finished run: {error}", "give the --out of a finished train or infer"
        ) from None
    try:
        config = parse_yaml(read_text(run_dir, "config.yaml"))
    except (DataError, ValueError):
        config = None
    return Run(run_dir, header, content, config if isinstance(config, dict) else {})


def _page(run: Run) -> str:
    simulated = run.is_training and run.content.get("simulated") is True
    title = f"{'Federated training' if run.is_training else 'Encrypted diagnosis'}: {run.header.name}"
    if simulated:
        title = f"Simulated training: {run.header.name}"
    of_kind = _TRAINING if run.is_training else _DIAGNOSIS
    if run.is_of_a_party:
        title, of_kind = f"{title}, at {run.party.party}", _HOSPITAL if is_hospital(run.party.party) else _AGGREGATOR
    builders, remark = {**of_kind, **_BOTH}, _SIMULATED if simulated else ""
    if run.is_training and run.content.get("central") is True:
        title, builders, remark = f"Central training: {run.header.name}", _CENTRAL, _AT_ONE_PLACE
    sections = {name: Markup("".join(guarded(build, run) for build in of)) for name, of in builders.items()}
    sections = {name: content for name, content in sections.items() if content}
    for name in sections.keys() - {
        _CONFIGURATION
    }:  # which is shown as it is; a chosen name has no letter that HTML minds
        sections[name] = Markup(run.names.in_text(sections[name]))
    return document(run.names.in_text(title), run.header.synthetic, sections, remark)


def document(title: str, synthetic: bool, sections: Mapping[str, Markup], remark: str = "") -> str:
    """A page of sections by name, with a banner where the data are synthetic, and one for a remark about all of it."""
    banner = paragraph("SYNTHETIC DATA: phantoms, not patients", "banner") if synthetic else ""
    banner += paragraph(remark, "banner") if remark else ""
    title, contents, main = escape(title), "", ""
    for index, (name, content) in enumerate(sections.items()):
        contents += f'<li><a href="#s{index}">{name}</a></li>'
        main += f'<section id="s{index}"><h2>{name}</h2>{content}</section>'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{title}</title>
<style>{STYLE_SHEET}</style></head><body>{banner}<h1>{title}</h1>
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
    write_text(path, _page(run))
    return path
