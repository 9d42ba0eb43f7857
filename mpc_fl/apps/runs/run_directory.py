"""The directory of a run: it appears under its name complete or not at all, and keeps what a failed run must not lose."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from mpc_fl.apps.model_card import CARD_FILE
from mpc_fl.apps.summaries import SUMMARY_FILE
from mpc_fl.audit.opening_record import OPENINGS_FILE
from mpc_fl.audit.receipts import RECEIPTS_FILE
from mpc_fl.audit.reveal_ledger import LEDGER_FILE, UNCONFIRMED_FILE
from mpc_fl.config.config import Config, party_names
from mpc_fl.crypto.certificates import ROOT_FILE
from mpc_fl.errors import ConfigError, MpcFlError
from mpc_fl.federation.attendance import COMMON
from mpc_fl.files import write_text
from mpc_fl.inference.results import RESULTS_FILE
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.roles import AGGREGATOR

FROM_ALL = (
    "model.safetensors",
    CARD_FILE,
    "metrics.jsonl",
    OPENINGS_FILE,
    LEDGER_FILE,
)  # what the aggregator has for all
_PACKAGES = ("mpc-fl", "torch", "torchvision", "crypten", "opacus", "numpy", "cryptography")
_KEPT = (LEDGER_FILE, UNCONFIRMED_FILE, OPENINGS_FILE, RECEIPTS_FILE, RESULTS_FILE)  # of a run that failed


def require_free(out: Path, resume: bool = False) -> None:
    """Before anything is read: a run can become `out`, or there is one to go on with, perhaps a finished one that is to have more
    rounds. Raises `ConfigError`."""
    try:
        if resume and is_finished(out):
            if _beside(out)[0].exists():
                raise _in_use(_beside(out)[0])
            return
        if out.exists() or out.is_symlink():
            raise ConfigError(f"{out} exists already", "choose another --out, or move it away")
        partial, failed = _beside(out)
        if resume and not has_state(partial if partial.exists() else failed):
            raise ConfigError(f"there is no run to go on with at {failed}", "start it without --resume")
        if not resume and partial.exists():
            raise _in_use(partial)
    except OSError as error:
        raise ConfigError(f"cannot create {out}: {error.strerror}", "choose another --out") from None


def _beside(out: Path) -> tuple[Path, Path]:
    """Where a run is while it works, and after it failed."""
    return out.with_name(out.name + ".partial"), out.with_name(out.name + ".failed")


def _in_use(partial: Path) -> ConfigError:
    dead = "go on with it with --resume, or remove it," if has_state(partial) else "remove it"
    return ConfigError(f"{partial} exists", f"another run is using it; {dead} if that one is dead")


@contextlib.contextmanager
def run_directory(out: Path, resume: bool = False) -> Iterator[Path]:
    """Yield the working directory of a run that shall become `out`; with `resume` that of the run which failed or died, or is
    finished and shall have more rounds.

    Raises `ConfigError` when `out` exists: results are never overwritten; or when there is nothing to go on with.
    """
    require_free(out, resume)
    partial, failed = _beside(out)
    try:
        if not resume:
            partial.mkdir(parents=True)
        elif is_finished(out):
            out.rename(partial)
        elif not partial.exists():
            failed.rename(partial)
    except FileExistsError:
        raise _in_use(partial) from None
    except OSError as error:
        raise ConfigError(f"cannot create {out}: {error.strerror}", "choose another --out") from None
    try:
        yield partial
        _remove_half_written(partial)
        partial.rename(out)
    except BaseException:
        with contextlib.suppress(
            OSError
        ):  # of what is full already: everything is left where it is, and the error goes on
            if is_finished(partial):  # given more rounds, of which nothing was begun
                partial.rename(out)
            else:
                _keep_logs(partial, failed)
        raise


def _remove_half_written(directory: Path) -> None:
    """What a party was writing when it was ended: a file (`files.written_whole`), or a database with its journal beside it."""
    for half in directory.rglob(".*.partial*"):
        half.unlink(missing_ok=True)


def earlier_failure(out: Path) -> Path | None:
    """Where the last run that failed before this one became `out` still lies, None where there is none."""
    failed = _beside(out)[1]
    return failed if failed.is_dir() else None


def may_go_on(out: Path) -> bool:
    """Whether a run that failed at `out` has kept what `--resume` needs."""
    return not out.exists() and any(map(has_state, _beside(out)))


def has_state(directory: Path) -> bool:
    """Whether a round of this run was completed: its aggregator has a checkpoint, or hospitals of what they have in common."""
    parties = directory / "parties"
    return any((parties / AGGREGATOR).glob("checkpoint-*.safetensors")) or any(
        parties.glob(f"*/{COMMON}/checkpoint-*.safetensors")
    )


def is_finished(directory: Path) -> bool:
    """Whether this is a training run that is complete: all that its aggregator has for all lies in it."""
    return (directory / SUMMARY_FILE).is_file() and (directory / LEDGER_FILE).is_file()


def _keep_logs(partial: Path, failed: Path) -> None:
    """Logs and configuration, and what was revealed until then: diagnoses, reveal ledgers, receipts, with the certificate."""
    shutil.rmtree(failed, ignore_errors=True)
    _remove_half_written(partial)
    logs, receipts = partial / "logs", [*partial.rglob(RECEIPTS_FILE), *partial.rglob(RESULTS_FILE)]
    if has_state(partial):
        partial.rename(failed)
        return
    if receipts or (logs.is_dir() and any(logs.iterdir())):
        failed.mkdir(parents=True)
        if logs.is_dir():
            logs.rename(failed / "logs")
        if (partial / "config.yaml").is_file():
            (partial / "config.yaml").rename(failed / "config.yaml")
        for path in [path for name in _KEPT for path in partial.rglob(name)]:
            kept = failed / path.relative_to(partial)
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.rename(kept)
        for path in [
            partial / ROOT_FILE,
            *partial.glob(f"parties/*/{ROOT_FILE}"),
            *partial.glob(f"parties/*/identity/{ROOT_FILE}"),
        ]:
            if path.is_file():
                path.replace(failed / ROOT_FILE)
        # What a failed run released stays released: its privacy ledgers are kept.
        for ledger in partial.glob("parties/*/*-privacy.*"):  # with the journal of one that was being written
            ledger.rename(failed / ledger.name)
    shutil.rmtree(partial, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of the packages results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def count_parameters(path: Path, config: Config) -> int:
    """Number of trainable parameters of a model file."""
    return sum(parameter.numel() for parameter in load_model(path, config).parameters() if parameter.requires_grad)


def keep_authority(config: Config, directory: Path) -> None:
    """The authority's certificate in a run's own directory, to verify the reveal ledger with."""
    root = directory / "parties" / party_names(config)[0] / "identity" / ROOT_FILE
    try:
        write_text(directory / ROOT_FILE, root.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError):
        raise MpcFlError(f"{root} cannot be read", "start the run anew in another directory") from None


def forget_identities(config: Config, directory: Path) -> None:
    """Keys of a local run serve only that run. Nothing is written, so a full disk does not keep them."""
    (directory / "session").unlink(missing_ok=True)
    for name in party_names(config):
        identity = directory / "parties" / name / "identity"
        if identity.is_dir():
            shutil.rmtree(identity)
