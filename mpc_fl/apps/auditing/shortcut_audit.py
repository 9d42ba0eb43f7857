"""`mpc-fl audit shortcuts`: what a finished run's diagnoses rest on, found on its own films, as a directory with a report.

Three questions: does the diagnosis live in the lungs (`study`), can the site be told from the film (`probe_sites`), and
does it hold where the model has not been (`leave_sites_out`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpc_fl.apps.auditing.finished_run import summary_content, summary_of
from mpc_fl.apps.auditing.shortcut_configs import FEWEST_HOSPITALS, left_out_config, probe_config, require_films
from mpc_fl.apps.auditing.shortcut_runs import (
    JudgingModel,
    SiteFilms,
    Told,
    films_of_sites,
    model_of_run,
    together,
    train_again,
    train_alone,
)
from mpc_fl.apps.runs.run_directory import require_free, run_directory, versions
from mpc_fl.apps.shortcut_summary import (
    ALONE,
    FEDERATION,
    SHORTCUTS_FILE,
    ChangeFound,
    FilmShown,
    ModelStudied,
    ProbeFound,
    ShortcutSummary,
    SiteLeftOut,
)
from mpc_fl.apps.summaries import PartySummary
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.errors import ConfigError, DataError
from mpc_fl.evidence.shortcuts_perturbed import PERTURBATIONS, Films
from mpc_fl.evidence.shortcuts_sites import site_guesses
from mpc_fl.evidence.shortcuts_tested import Answers, Changed, accuracy_and_area, changed
from mpc_fl.files import write_json
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.records import is_one_hospitals
from mpc_fl.learning.data.tables import Part
from mpc_fl.learning.models.shares import holm
from mpc_fl.progress import Progress
from mpc_fl.roles import hospital_name, is_hospital, split_name

_PARTY = "audit"  # what progress is told of
_PHANTOMS, _FILMS = "the phantoms' own lungs", "two fixed fields over the central two thirds of the height"


@dataclass(frozen=True)
class ShortcutRequest:
    """The audit of the run in a directory: with a probe of sites, with trainings without and at each site alone, with pictures of
    films that are not synthetic; `command` is noted, and `data` says where the films are now, where that is elsewhere."""

    run: Path
    probe: bool
    left_out: bool
    pictures: bool
    command: str
    data: Path | None = None


def audit_shortcuts(request: ShortcutRequest, out: Path, progress: Progress) -> ShortcutSummary:
    """Audit a run and write what was found, with a report, to the new directory `out`.

    Raises `DataError` where there is no finished run or its films are not here, `ConfigError` for a run that has no films or
    an `out` that exists, `ModelError` for a model that is not the run's, and what the run itself would raise.
    """
    require_free(out)
    began, (config, synthetic, only) = time.monotonic(), _run_and_films(request)
    require_films(config)
    model, hospitals = model_of_run(request.run / MODEL_FILE, config), config.federation.hospitals
    parts: list[Part] = ["train", "test"] if request.probe or request.left_out else ["test"]
    parts += ["validation"] if config.data.validation_fraction and request.left_out else []
    sites = films_of_sites(config, parts, only)
    progress(_PARTY, "films", len(sites), len(sites))
    probe = probe_sites(config, sites, progress) if request.probe else None
    alone = dict[str, JudgingModel]()
    if request.left_out:
        for place, site in enumerate(sites):
            alone[site.name] = train_alone(config, site, _phase(progress, "alone", place, hospitals))
    left_out = leave_sites_out(config, sites, model, alone, progress) if request.left_out else []
    studied = _studied(model, alone, sites, progress)
    summary = ShortcutSummary(
        name=config.name,
        run=str(request.run),
        synthetic=synthetic,
        command=request.command,
        versions=versions(),
        classes=list(config.data.classes),
        hospitals=hospitals,
        films_of=None if only is None else hospital_name(only),
        lungs=_PHANTOMS if config.data.source == "phantoms" else _FILMS,
        mark=_mark_of(config),
        models=studied,
        probe=probe,
        left_out=left_out,
        seconds=round(time.monotonic() - began, 2),
    )
    with run_directory(out) as directory:
        from mpc_fl.apps.report.shortcut_page import write_shortcut_report  # draws: matplotlib comes with it

        write_json(directory / SHORTCUTS_FILE, summary.to_json())
        shown = pictures(model, sites) if synthetic or request.pictures else []
        write_shortcut_report(directory, shown)
    return summary


def _run_and_films(request: ShortcutRequest) -> tuple[Config, bool, int | None]:
    """The configuration of a run, whether its films are synthetic, and whose films alone are here, by rank; None for those of all.

    A run may be that of all parties, or what one hospital kept of it, which then audits with its own films.
    """
    header, content = summary_content(request.run)
    config = load_config(request.run / "config.yaml")
    site = config.site.model_dump(mode="json")
    if request.data is not None:
        site["data"] = str(request.data.resolve())
    if header.kind != PartySummary.KIND:
        return config.with_values(site=site), summary_of(request.run).synthetic, None
    party = PartySummary.from_json(content)
    if not is_hospital(party.party):
        raise DataError(f"{request.run} is that of {party.party}, which has no films", "give a hospital's directory")
    own = config.with_values(site={**site, "data_of": "hospital"})
    if not is_one_hospitals(own):
        return own, party.synthetic, None
    if request.probe or request.left_out:
        raise ConfigError(
            f"the films of {party.party} alone are here: neither a probe of sites nor a training without one can be made of them",
            "add --no-probe --no-left-out",
        )
    return own, party.synthetic, split_name(party.party)[1]


def _mark_of(config: Config) -> str | None:
    """What was put into phantoms, in words; None where nothing was."""
    shortcut = config.data.phantoms.shortcut
    if config.data.source != "phantoms" or shortcut.site is None:
        return None
    diagnosis, site = config.data.classes[shortcut.diagnosis], hospital_name(shortcut.site)
    return (
        f"a letter in a corner of {shortcut.probability:.0%} of the patients with {diagnosis} at {site}, of "
        f"{1 - shortcut.probability:.0%} of its others, and of {shortcut.elsewhere:.0%} of all patients elsewhere"
    )


def _phase(progress: Progress, name: str, part: int, parts: int) -> Told:
    """Tells how far a phase is that has `parts` equal parts, of which this is number `part`."""
    return lambda done, of: progress(_PARTY, name, part * of + done, parts * of)


# ---- what the diagnosis rests on -----------------------------------------------------------------------------------------


def study(model: JudgingModel, films: Dataset, lungs: torch.Tensor, seed: int = 0) -> tuple[Answers, list[Changed]]:
    """What a model says of films, and what each change of them does to that; p-values corrected over all changes.

    `lungs` bool (N, side, side). `seed` is that of resamples and flips, which are no secret.
    """
    before, found = model.answers(films), list[Changed]()
    given = Films(films.inputs, lungs, films.labels)
    for change in PERTURBATIONS:
        after = model.answers(replace(films, inputs=change.of(given)))
        seams = None if change.seams is None else model.answers(replace(films, inputs=change.seams(given)))
        found.append(changed(change.name, change.kind, before, after, seed, seams))
    corrected = holm([one.p_value for one in found])
    return before, [replace(one, p_holm=value) for one, value in zip(found, corrected, strict=True)]


def _studied(
    model: JudgingModel, alone: dict[str, JudgingModel], sites: Sequence[SiteFilms], progress: Progress
) -> list[ModelStudied]:
    """The run's model on the films of all and of each hospital, and each hospital's own on its own films."""
    whole, all_lungs = together([site.test for site in sites]), torch.cat([site.lungs for site in sites])
    tasks: list[tuple[str, JudgingModel, str | None, Dataset, torch.Tensor]]
    tasks = [(FEDERATION, model, None, whole, all_lungs)]
    tasks += [(FEDERATION, model, site.name, site.test, site.lungs) for site in sites if len(sites) > 1]
    tasks += [(ALONE, alone[site.name], site.name, site.test, site.lungs) for site in sites if site.name in alone]
    found = list[ModelStudied]()
    for number, (kind, judging, name, films, lungs) in enumerate(tasks, 1):
        before, changes = study(judging, films, lungs)
        accuracy, area = accuracy_and_area(before, 0)
        found.append(
            ModelStudied(
                kind, name, films.patient_count, len(films), accuracy, area, [ChangeFound.of(one) for one in changes]
            )
        )
        progress(_PARTY, "changed films", number, len(tasks))
    return found


# ---- sites ---------------------------------------------------------------------------------------------------------------


def probe_sites(config: Config, sites: Sequence[SiteFilms], progress: Progress) -> ProbeFound:
    """Train a probe of sites as the run was trained, and ask it about all test films."""
    labelled = [
        {part: replace(films, labels=torch.full_like(films.labels, site.rank)) for part, films in site.parts.items()}
        for site in sites
    ]
    trained = train_again(probe_config, config, labelled, _phase(progress, "probe of sites", 0, 1))
    films = together([site.test for site in sites])
    truth = together([own["test"] for own in labelled]).labels
    guesses = site_guesses(trained.model.answers(films, truth), films.labels, 0)
    return ProbeFound(
        sites=len(sites),
        records=len(films),
        steps=config.training.rounds * config.training.local_steps,
        mechanism=config.privacy.mechanism,
        epsilon=trained.epsilon,
        told=guesses.told,
        **vars(guesses),
    )


def leave_sites_out(
    config: Config,
    sites: Sequence[SiteFilms],
    model: JudgingModel,
    alone: dict[str, JudgingModel],
    progress: Progress,
) -> list[SiteLeftOut]:
    """For each site the accuracy there of the run's model, of one trained without the site, and of the site's own."""
    found = []
    for place, site in enumerate(sites):
        others, without = [other for other in sites if other is not site], None
        if len(others) >= FEWEST_HOSPITALS:
            told = _phase(progress, "without each site", place, len(sites))
            trained = train_again(left_out_config, config, [other.parts for other in others], told)
            without = accuracy_and_area(trained.model.answers(site.test), 0)[0]
        elsewhere = together([other.test for other in others])
        found.append(
            SiteLeftOut(
                site.name,
                site.test.patient_count,
                accuracy_and_area(model.answers(site.test), 0)[0],
                without,
                accuracy_and_area(alone[site.name].answers(site.test), 0)[0],
                accuracy_and_area(alone[site.name].answers(elsewhere), 0)[0],
            )
        )
    return found


# ---- pictures ------------------------------------------------------------------------------------------------------------


def pictures(model: JudgingModel, sites: Sequence[SiteFilms]) -> list[FilmShown]:
    """The first test film of each class, untouched and after each change, with the model's probability of its class."""
    films, lungs = together([site.test for site in sites]), torch.cat([site.lungs for site in sites])
    rows = [int((films.labels == label).nonzero()[0]) for label in torch.unique(films.labels).tolist()]
    versions = {"untouched": films.inputs[rows]}
    given = Films(films.inputs, lungs, films.labels)
    versions |= {change.name: change.of(given)[rows] for change in PERTURBATIONS}
    few = replace(films, labels=films.labels[rows], patients=torch.arange(len(rows)), names=())
    said = {
        name: torch.softmax(model.answers(replace(few, inputs=images)).logits.double(), dim=1)
        for name, images in versions.items()
    }
    return [
        FilmShown(
            int(films.labels[row]),
            {name: (images[place] * 255).round().to(torch.uint8).numpy() for name, images in versions.items()},
            {name: float(chances[place, films.labels[row]]) for name, chances in said.items()},
        )
        for place, row in enumerate(rows)
    ]
