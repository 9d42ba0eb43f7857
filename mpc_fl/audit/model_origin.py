"""Whether a model file is the one that all parties of a training run signed: its SHA-256 is in the last block of their ledger.

The ledger and the federation's certificate are looked for beside the model file, where a run leaves them, unless they are given.
What is beside it could be exchanged together with it: a certificate that is held otherwise says more (`authority`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from mpc_fl.audit.ledger_audit import Reading, read_ledger
from mpc_fl.audit.ledger_file import earlier_authorities
from mpc_fl.audit.reveal_ledger import LEDGER_FILE
from mpc_fl.crypto.certificates import ROOT_FILE, load_root
from mpc_fl.errors import IdentityError, ModelError, MpcFlError

MODEL_FILE = "model.safetensors"  # the name under which its digest is signed
_WHAT_WITH = "see what with: mpc-fl ledger verify"


@dataclass(frozen=True)
class ModelOrigin:
    """What is known of a model file: its SHA-256, whether all parties signed it, and a sentence that says so, or why not."""

    sha256: str
    signed: bool
    words: str


def model_origin(model: Path, ledger: Path | None = None, authority: Path | None = None) -> ModelOrigin:
    """Hold a model file against the ledger of the run that trained it.

    `ledger` (a file, or the directory of a run) and `authority`, the federation's certificate, are by default beside it.

    Raises `ModelError` when it is not the file that was signed, when a ledger is there and does not verify, and when one was
    given and says nothing of the file. Without a ledger, or with one that holds no digest of the file, `signed` is False.
    """
    digest, asked = hashlib.sha256(_read(model, "model file")).hexdigest(), ledger is not None or authority is not None
    path = _ledger_path(model, ledger)
    if not path.exists():
        return _unchecked(digest, asked, f"there is no {LEDGER_FILE} beside it, so nobody knows who trained it")
    certificate = authority or path.parent / ROOT_FILE
    if authority is None and not certificate.exists():
        return _unchecked(digest, asked, f"there is no {ROOT_FILE} beside {path} to verify that with")
    try:
        root = load_root(_read(certificate, "certificate"), str(certificate), "give the federation's with --authority")
    except IdentityError as error:
        raise ModelError(error.what, error.fix) from None
    try:
        earlier = earlier_authorities(path.parent)
    except MpcFlError as error:
        raise ModelError(error.what, error.fix) from None
    reading = read_ledger(_read(path, "reveal ledger"), root, earlier)
    if reading.findings:
        raise ModelError(f"the reveal ledger {path} does not verify: {reading.findings[0].line}", _WHAT_WITH)
    signed = _signed_digest(reading)
    if signed is None:
        return _unchecked(digest, asked, f"{path} holds no digest of a model file: {_why_not(reading)}")
    if signed != digest:
        raise ModelError(
            f"model file {model} is not the one that all parties signed in {path}",
            "take the file of that run, or give the ledger of the run that trained this one with --ledger",
        )
    parties = ", ".join(reading.chain.certificates)
    return ModelOrigin(digest, True, f"is the one that all parties signed in {path} ({parties})")


def _ledger_path(model: Path, given: Path | None) -> Path:
    if given is None:
        return model.parent / LEDGER_FILE
    path = given / LEDGER_FILE if given.is_dir() else given
    if not path.exists():
        raise ModelError(f"there is no reveal ledger {path}", "give that of the run that trained the model")
    return path


def _unchecked(digest: str, asked: bool, why: str) -> ModelOrigin:
    """Not signed, as far as is known. Raises `ModelError` where a ledger or certificate was given, and so a check asked for."""
    if asked:
        raise ModelError(f"the model file cannot be checked: {why}", "give --ledger and --authority of its run")
    return ModelOrigin(digest, False, f"could not be checked: {why}")


def _signed_digest(reading: Reading) -> str | None:
    last = reading.blocks[-1] if reading.blocks else None
    return last.values.get(MODEL_FILE) if last is not None and reading.chain.ended else None


def _why_not(reading: Reading) -> str:
    return "each hospital has a model of its own" if reading.chain.ended else "the run has not come to its end in it"


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{what} {path} does not exist", "check the path") from None
    except OSError as error:
        raise ModelError(f"cannot read {what} {path}: {error.strerror}", "check the path") from None
