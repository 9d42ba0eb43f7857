"""What each party of a run saw, audited (`mpc-fl audit views`): views.json, pictures and report.html in a directory of their own.

1. What the parties recorded of the messages they received: a table of it, and tests of all masked words (`recorded_views`).
2. Of a training run its sums made again with the plaintext at hand, and tests of what their words show of it (`repeated_views`).
3. Gradient inversion on what leaves a hospital, in four forms (`inverted_updates`).
4. Where the run was on phantoms, extraction of its model by queries (`extracted_models`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from mpc_fl.apps.auditing.audited_config import noise_of_steps
from mpc_fl.apps.auditing.extracted_models import extract_model
from mpc_fl.apps.auditing.finished_run import summary_content
from mpc_fl.apps.auditing.inverted_updates import Attack, InversionsFound, invert_updates
from mpc_fl.apps.auditing.recorded_views import PValues, add_tests_of_records, received_by, require_record
from mpc_fl.apps.auditing.repeated_views import add_tests_of_repetitions
from mpc_fl.apps.runs.run_directory import require_free, run_directory, versions
from mpc_fl.apps.summaries import PartySummary, TrainingSummary
from mpc_fl.apps.views_summary import PICTURES_FILE, VIEWS_FILE, Extraction, ViewsSummary
from mpc_fl.audit.model_origin import MODEL_FILE
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.errors import DataError
from mpc_fl.evidence.inversion import Search
from mpc_fl.files import write_json, written_whole
from mpc_fl.progress import Progress

LEVEL = 0.01  # of all tests together
_PARTY = "audit"  # what progress is told of


@dataclass(frozen=True)
class ViewsRequest:
    """The audit of the run in a directory: so many images to invert, in so many steps, and so many queries (none: 0); `command`
    is noted."""

    run: Path
    images: int
    steps: int
    queries: int
    command: str


@dataclass(frozen=True)
class _Run:
    """A finished run: its configuration, and of training the noise multiplier that its hospitals had."""

    name: str
    synthetic: bool
    trained: bool
    config: Config
    noise: float | None


def _finished(directory: Path) -> _Run:
    header, content = summary_content(directory)
    if header.kind == PartySummary.KIND:
        raise DataError(
            f"{directory} is the run of one party alone", "give the --out of a train or infer of all parties"
        )
    config, trained = load_config(directory / "config.yaml"), header.kind == TrainingSummary.KIND
    noises = [of.noise_multiplier for of in TrainingSummary.from_json(content).privacy] if trained else []
    known = [noise for noise in noises if noise is not None]
    return _Run(header.name, header.synthetic, trained, config, min(known) if known else None)


def audit_views(request: ViewsRequest, out: Path, progress: Progress) -> ViewsSummary:
    """Audit what parties of a run saw, and write what was found, with a report, to the new directory `out`.

    Raises `DataError` where there is no finished run or no record of messages, `ConfigError` for an `out` that exists, and what the
    run itself would raise.
    """
    began, run = time.monotonic(), _finished(request.run)
    require_free(out)
    parties, recorded, repeated = require_record(request.run), PValues(), PValues()
    received, not_kept = received_by(parties)
    progress(_PARTY, "messages", 0, 1)
    add_tests_of_records(parties, recorded)
    progress(_PARTY, "messages", 1, 1)
    found, extraction, noise = InversionsFound([], {}), None, None
    if run.trained:
        add_tests_of_repetitions(run.config, run.noise, repeated, lambda done, of: progress(_PARTY, "rounds", done, of))
        noise = noise_of_steps(run.config) if run.noise is None else run.noise
        attack = Attack(request.images, run.config.federation.hospitals, noise, Search(request.steps))
        found = invert_updates(attack, lambda done, of: progress(_PARTY, "inversion", done, of))
        extraction = _extraction(request, run, progress)
    summary = ViewsSummary(
        name=run.name,
        run=str(request.run),
        synthetic=run.synthetic,
        command=request.command,
        versions=versions(),
        mechanism=run.config.privacy.mechanism if run.trained else None,
        hospitals=run.config.federation.hospitals if run.trained else 1,
        level=LEVEL,
        received=received,
        not_kept=not_kept,
        # Both halves at half the level: with probability 1 - level none is rejected that should hold.
        recorded=recorded.judged(LEVEL / 2),
        repeated=repeated.judged(LEVEL / 2),
        noise_multiplier=noise,
        inversions=found.inversions,
        extraction=extraction,
        seconds=round(time.monotonic() - began, 2),
    )
    with run_directory(out) as directory:
        from mpc_fl.apps.report.views_page import write_views_report  # draws: matplotlib comes with it

        write_json(directory / VIEWS_FILE, summary.to_json())
        with written_whole(directory / PICTURES_FILE) as temporary:
            temporary.write_bytes(save(dict(found.pictures)))
        write_views_report(directory)
    return summary


def _extraction(request: ViewsRequest, run: _Run, progress: Progress) -> Extraction | None:
    if request.queries == 0 or run.config.data.source != "phantoms":
        return None
    return extract_model(
        request.run / MODEL_FILE,
        run.config,
        request.queries,
        lambda done, of: progress(_PARTY, "extraction", done, of),
    )
