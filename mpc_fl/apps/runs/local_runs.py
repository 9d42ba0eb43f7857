"""A whole local run: a directory that appears complete or not at all, its summary and its report.

While a run works its directory is `<out>.partial`. It is renamed to `<out>` when everything is written; after a failure
`<out>.failed` keeps configuration and logs, what was revealed and spent, and where a round was completed what it takes to
go on from there: checkpoints and the parties' keys. These go last, when nothing is left to write: a disk that fills up with
the last file of a run costs nothing but that file.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mpc_fl.apps.runs.launcher import launch
from mpc_fl.apps.runs.local_parties import local_addresses
from mpc_fl.apps.runs.party_log import set_up_log
from mpc_fl.apps.runs.party_process import run_alone
from mpc_fl.apps.runs.party_starter import PartyStarter
from mpc_fl.apps.runs.reopening import reopened, require_more_rounds
from mpc_fl.apps.runs.run_directory import (
    FROM_ALL,
    forget_identities,
    keep_authority,
    require_free,
    run_directory,
    versions,
)
from mpc_fl.apps.runs.training_summary import conclude, costs_of_parties, training_summary
from mpc_fl.apps.search_summary import SEARCH_FILE
from mpc_fl.apps.summaries import (
    SUMMARY_FILE,
    Comparison,
    DiagnosisSummary,
    ImageResult,
    ServedDiagnosisSummary,
    Summary,
    TrainingSummary,
)
from mpc_fl.apps.typed_json import typed
from mpc_fl.audit.model_origin import ModelOrigin, model_origin
from mpc_fl.config.config import Config, party_names
from mpc_fl.config.deployment import SiteSection
from mpc_fl.crypto.authority import make_local_identities
from mpc_fl.crypto.certificates import ROOT_FILE
from mpc_fl.crypto.identity_files import load_identity
from mpc_fl.errors import ConfigError, MpcFlError, RefusedError
from mpc_fl.exhaustion import system_error
from mpc_fl.federation.attendance import COMMON, ROUNDS_FILE
from mpc_fl.federation.checkpoint import keep_last_checkpoint
from mpc_fl.files import read_json_lines, write_json, write_text, written_whole
from mpc_fl.inference.diagnosis import require_supported
from mpc_fl.inference.serving.client import asking_hospital
from mpc_fl.inference.serving.service_links import identity_of, require_servable
from mpc_fl.learning.data.dataset import Dataset, normalised
from mpc_fl.learning.data.loading import load_images
from mpc_fl.learning.models.class_offsets import with_offsets
from mpc_fl.learning.models.evaluation import predict
from mpc_fl.learning.models.feature_extractor import as_records
from mpc_fl.learning.models.model_file import load_calibration, load_model, load_normalisation
from mpc_fl.progress import Progress
from mpc_fl.roles import AGGREGATOR, HOSPITAL, hospital_names

_SERVICE_HOURS = 24.0 * 365  # validity of the certificates of a service on this machine


def train(
    config: Config,
    out: Path,
    command: str,
    progress: Progress,
    resume: bool = False,
    starter: PartyStarter | None = None,
) -> TrainingSummary:
    """Train in local processes, or go on with a run that failed or shall have more rounds; return the summary.

    Raises `RunFailedError` naming the failed party, `ConfigError` when there is nothing to go on with.
    """
    require_free(out, resume)
    config = config.with_values(task="train", site={"resume": resume})
    require_more_rounds(out, config)
    with run_directory(out, resume) as directory, reopened(directory, config):
        write_text(directory / "config.yaml", config.to_yaml())
        began, aggregator = time.monotonic(), directory / "parties" / AGGREGATOR
        if not config.among_peers:
            _move(directory, aggregator)  # where a run that failed when all parties had finished has them
        lost = launch(config, directory, progress, starter)
        if config.among_peers:
            _take_from_peers(config, directory, lost)
        else:
            _move(aggregator, directory)
        keep_authority(config, directory)
        summary = training_summary(config, directory, command, time.monotonic() - began, lost)
        try:
            conclude(directory, summary)
        except BaseException:  # a run without its report is none that is finished: `--resume` writes both
            (directory / SUMMARY_FILE).unlink(missing_ok=True)
            raise
        forget_identities(config, directory)
        for party in (directory / "parties").iterdir():
            for kept in (party, party / COMMON):  # for a run that is given more rounds
                keep_last_checkpoint(kept)
    return summary


def _move(source: Path, target: Path) -> None:
    """What the aggregator has for all, as far as it is there."""
    for name in FROM_ALL:
        if (source / name).exists():
            (source / name).replace(target / name)


def _take_from_peers(config: Config, directory: Path, lost: list[str]) -> None:
    """What all hospitals have alike, from the first one that finished, for the run's own directory; they keep theirs."""
    source = directory / "parties" / next(name for name in party_names(config) if name not in lost)
    for name in FROM_ALL:
        with written_whole(directory / name) as temporary:
            shutil.copyfile(source / (ROUNDS_FILE if name == "metrics.jsonl" else name), temporary)


def _unreported(directory: Path, summary: Summary, config: Config | None = None) -> str | None:
    """The same of a diagnosis, which is not lost when these do not fit the disk: then why.

    With `config` the authority's certificate of a run on this machine is kept, too.
    """
    try:
        if config is not None:
            keep_authority(config, directory)
        conclude(directory, summary)
    except MpcFlError as error:
        return f"the diagnoses are written and the report is not: {error.what}"
    except OSError as error:
        return f"the diagnoses are written and the report is not: {system_error(error).what}"
    return None


def infer(
    config: Config, out: Path, command: str, progress: Progress, starter: PartyStarter | None = None
) -> DiagnosisSummary:
    """Encrypted diagnosis in local processes; return the summary. Raises `RunFailedError`, `ModelError`, `DataError`."""
    config = config.with_values(task="infer")
    if config.site.model is None:
        raise ConfigError("no model was given", "pass --model FILE")
    require_free(out)
    # What is wrong with model, network or images is told before processes start.
    require_supported(config, load_model(config.site.model, config))
    origin = model_origin(config.site.model, config.site.reveal_ledger, config.site.authority)
    images = load_images(config.site.images, config, config.inference.limit)
    import mpc_fl.apps.report.page  # noqa: F401 - while the parties' process still imports, not when all wait for the report

    with run_directory(out) as directory:
        write_text(directory / "config.yaml", config.to_yaml())
        began = time.monotonic()
        launch(config, directory, progress, starter)
        results = _results(directory / "parties" / HOSPITAL)
        comparison = _compare(config, images, results, directory) if config.inference.plaintext_reference else None
        summary = DiagnosisSummary(
            name=config.name,
            synthetic=config.data.source == "phantoms",
            images=len(results),
            skipped_files=images.skipped,
            classes=list(config.data.classes),
            seconds=round(time.monotonic() - began, 2),
            seconds_per_image=_seconds_per_image(results),
            command=command,
            versions=versions(),
            comparison=comparison,
            model_file=origin,
            results=results,
            names=config.federation.names or None,
            costs=costs_of_parties(directory, party_names(config)),
        )
        summary = replace(summary, unreported=_unreported(directory, summary, config))
        forget_identities(config, directory)
    return summary


def _results(hospital: Path) -> list[ImageResult]:
    """What a hospital's diagnosis left in its directory."""
    return [typed(ImageResult, line, "results.jsonl") for line in read_json_lines(hospital / "results.jsonl")]


def _seconds_per_image(results: list[ImageResult]) -> float:
    return round(sum(result.seconds for result in results) / len(results), 3)


def serve(
    config: Config,
    directory: Path,
    progress: Progress,
    tell: Callable[[Path, ModelOrigin], None],
    starter: PartyStarter | None = None,
) -> None:
    """Keep a model owner and a dealer up in local processes until an interrupt; `directory` is kept from start to start.

    Makes identities for them and all hospitals of the federation in `directory`/parties/NAME/identity, and tells `tell` the
    path of the configuration that hospitals ask with, and whether the model is the one that was signed. Raises
    `RunFailedError` when one of the two fails.
    """
    config = config.with_values(task="serve")
    require_servable(config)
    if config.site.model is None:
        raise ConfigError("no model was given", "pass --model FILE")
    require_supported(config, load_model(config.site.model, config))
    origin = model_origin(config.site.model, config.site.reveal_ledger, config.site.authority)
    servers = party_names(config)
    names = [*servers, *hospital_names(config.federation.hospitals)]
    directories = {name: directory / "parties" / name / "identity" for name in names}
    if not all(path.is_dir() for path in directories.values()):
        make_local_identities(names, directories, _SERVICE_HOURS, config.federation.chosen_names)
    addresses = config.federation.addresses or local_addresses(servers, config.runtime.first_port)
    config = config.with_values(federation={"addresses": addresses})
    root = load_identity(directories[servers[0]], servers[0]).authority
    write_text(directory / ROOT_FILE, root.decode("ascii"))  # to verify receipts with
    nowhere = {name: SiteSection().model_dump()[name] for name in config.site.model_dump()}
    write_text(directory / "federation.yaml", config.with_values(site=nowhere).to_yaml())

    def ready(party: str, phase: str, done: int, total: int) -> None:
        progress(party, phase, done, total)
        if phase == "serving":
            serving.add(party)
            if serving == set(servers):
                tell(directory / "federation.yaml", origin)

    serving: set[str] = set()
    launch(config, directory, ready, starter)


def ask(config: Config, out: Path, command: str, progress: Progress) -> ServedDiagnosisSummary:
    """A hospital's diagnosis by a model owner that stays up, in this process; return the summary.

    `refused` in it says why not all images were answered. Raises `RefusedError` when none was.
    """
    config = config.with_values(task="serve")
    require_free(out)
    name = asking_hospital(config)
    with run_directory(out) as directory:
        write_text(directory / "config.yaml", config.to_yaml())
        root = identity_of(config, name).authority.decode("ascii")  # to verify receipts with
        write_text(directory / ROOT_FILE, root)
        own = directory / "parties" / name
        config = config.with_values(site={"out": str(own)})
        set_up_log(config.site.log or directory / "logs" / f"{name}.log", config.federation.chosen_names)
        began, refused = time.monotonic(), None
        try:
            run_alone(name, config, lambda phase, done, total: progress(name, phase, done, total))
        except RefusedError as error:
            if not (own / "results.jsonl").is_file():
                raise
            refused = str(error)
        results = _results(own)
        summary = ServedDiagnosisSummary(
            name=config.name,
            hospital=name,
            synthetic=config.data.source == "phantoms",
            images=len(results),
            classes=list(config.data.classes),
            seconds=round(time.monotonic() - began, 2),
            seconds_per_image=_seconds_per_image(results),
            command=command,
            versions=versions(),
            refused=refused,
            revealed=("label" if results[0].logits is None else "logits") if results else None,
            results=results,
            names=config.federation.names or None,
            costs=costs_of_parties(directory, [name]),
        )
        summary = replace(summary, unreported=_unreported(directory, summary))
    return summary


def _compare(config: Config, images: Dataset, results: list[ImageResult], directory: Path) -> Comparison:
    """The plaintext reference, computed by the user who has both model and images: for checking a simulation only."""
    assert config.site.model is not None
    model = load_model(config.site.model, config)
    model = with_offsets(model, config, load_calibration(config.site.model, config))
    torch.set_num_threads(1)
    began = time.monotonic()
    logits = predict(
        model, normalised(as_records(images, config), load_normalisation(config.site.model, config)).inputs, chunk=1
    )
    seconds = (time.monotonic() - began) / len(images.inputs)
    write_json(directory / "plaintext_reference.json", {"logits": logits.tolist(), "seconds": seconds})
    opened = config.reveal == "logits"
    encrypted = torch.tensor([result.logits for result in results]) if opened else None
    predicted = torch.tensor([result.predicted for result in results])
    return Comparison(
        largest_logit_difference=None if encrypted is None else float((encrypted - logits).abs().max()),
        classes_agree=bool((predicted == logits.argmax(1)).all()),
        plaintext_seconds_per_image=round(seconds, 4),
    )


def report(run_dir: Path) -> Path:
    """Write the report of a finished run or search again. Raises `MpcFlError` when `run_dir` is not one."""
    from mpc_fl.apps.report.page import write_report
    from mpc_fl.apps.report.search_page import write_search_report

    if (run_dir / SEARCH_FILE).is_file():
        return write_search_report(run_dir)
    if not (run_dir / SUMMARY_FILE).is_file():
        raise MpcFlError(
            f"{run_dir} is not a finished run: it has no {SUMMARY_FILE}", "give the --out of a train, infer or tune"
        )
    return write_report(run_dir)
