"""The model card beside a model file: made from what the aggregator, or a run on this machine, has in its directory.

That is the configuration, the model, the opened evaluations (metrics.jsonl) and the ledger that all signed. No hospital's own
metrics are read; among peers each has the opened evaluations, too (rounds.jsonl).
"""

from __future__ import annotations

from pathlib import Path

from mpc_fl.apps.estimates import NoPrivacy, PlannedPrivacy
from mpc_fl.apps.model_card import CARD_FILE, CardFacts, SignedModel, card_text
from mpc_fl.apps.rows import GlobalRound, read_rows
from mpc_fl.apps.runs.estimate import planned_privacy
from mpc_fl.audit.ledger_audit import read_ledger
from mpc_fl.audit.ledger_file import earlier_authorities
from mpc_fl.audit.model_origin import MODEL_FILE, model_origin
from mpc_fl.audit.reveal_ledger import LEDGER_FILE
from mpc_fl.config.config import Config
from mpc_fl.config.loading import load_config
from mpc_fl.crypto.certificates import ROOT_FILE, load_root
from mpc_fl.errors import ModelError
from mpc_fl.federation.attendance import ROUNDS_FILE
from mpc_fl.files import write_text
from mpc_fl.learning.data.loading import public_sizes
from mpc_fl.learning.models.model_file import load_model
from mpc_fl.learning.models.trainable import set_trainable
from mpc_fl.learning.models.weights_store import describe_file, find


def write_model_card(config: Config, directory: Path) -> Path:
    """Write the card of the model in `directory`, where a party has finished that knows what was opened; return its path.

    Raises `MpcFlError`."""
    identity = config.site.identity
    authority = None if identity is None else identity / ROOT_FILE
    path = directory / CARD_FILE
    write_text(path, model_card(config, directory, authority))
    return path


def model_card(config: Config, directory: Path, authority: Path | None = None) -> str:
    """The card of the model in `directory`; `authority` is the federation's certificate, by default beside the model.

    Raises `ModelError` for a model that is not there, does not fit the configuration, or is not the one that was signed;
    `DataError` for damaged metrics.
    """
    path = directory / MODEL_FILE
    model = set_trainable(load_model(path, config), config.training.trainable)
    opened = ROUNDS_FILE if (directory / ROUNDS_FILE).is_file() else "metrics.jsonl"
    rows = read_rows(GlobalRound, directory, opened)
    evaluated = [row for row in rows if row.evaluation is not None]
    certificate = authority if authority is not None and authority.is_file() else directory / ROOT_FILE
    origin = model_origin(path)  # refuses another file than the one that was signed
    return card_text(
        CardFacts(
            config=config,
            sha256=origin.sha256,
            parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            rounds=config.training.rounds,
            privacy=privacy_of_run(config),
            final=evaluated[-1].evaluation if evaluated else None,
            evaluated_round=evaluated[-1].round if evaluated else None,
            groups=rows[-1].groups if rows else None,
            signed=_signed(directory, certificate, origin.sha256),
            origins=origins_of(config),
        )
    )


def privacy_of_run(config: Config) -> NoPrivacy | PlannedPrivacy:
    """What a run spends of the patients of a hospital whose ledger held nothing before it."""
    smallest = 1 if config.privacy.mechanism == "none" else public_sizes(config).smallest
    return planned_privacy(config, "a hospital", smallest)


def _signed(directory: Path, certificate: Path, sha256: str) -> SignedModel | None:
    """What the ledger beside the model says; None where there is none that verifies to its end."""
    try:
        root = load_root(certificate.read_bytes(), str(certificate), "give the federation's")
        reading = read_ledger((directory / LEDGER_FILE).read_bytes(), root, earlier_authorities(directory))
    except OSError:
        return None
    blocks = [block for block in reading.blocks if block is not None]
    if reading.findings:
        raise ModelError(
            f"the reveal ledger in {directory} does not verify: {reading.findings[0].line}",
            "see mpc-fl ledger verify",
        )
    if not blocks or not reading.chain.ended:
        return None
    digest = blocks[-1].values.get(MODEL_FILE)
    if digest not in (None, sha256):
        raise ModelError(
            f"model file {directory / MODEL_FILE} is not the one that all parties signed", "take the file of that run"
        )
    return SignedModel(
        seal=reading.chain.seal,
        parties=tuple(blocks[-1].parties),
        digest=digest,
        configuration=next(block.members.configuration for block in reversed(blocks) if block.members is not None),
        openings=tuple(opening for block in blocks for opening in block.openings),
    )


def origins_of(config: Config) -> dict[str, str]:
    """Where weights come from that this training began with, or whose features it took."""
    features, found = config.data.features, dict[str, str]()
    if features is not None and features.weights is None:
        found["Features of images"] = f"{features.extractor}, which comes from no data"
    named = [
        ("Features of images", None if features is None else features.weights),
        ("Initial weights", config.model.initial_weights),
    ]
    for what, digest in named:
        if digest is not None:
            try:
                origin = describe_file(find(digest, config.site.weights)).get("origin", "origin not recorded")
            except ModelError:
                origin = "not on this machine"
            found[what] = f"{origin}, SHA-256 {digest}"
    return found


def card_of(path: Path, config: Path | None = None) -> str:
    """The card of a finished run's directory, or of the model file in one, made anew.

    `config` is the run's configuration where it is not beside the model. Raises `MpcFlError`.
    """
    directory = path if path.is_dir() else path.parent
    return model_card(load_config(configuration_beside(directory, config)), directory)


def configuration_beside(directory: Path, given: Path | None) -> Path:
    """The file that says how the model in `directory` was trained: the one that was given, else the run's own.

    Raises `ModelError` where there is none.
    """
    own = directory / "config.yaml"
    if given is None and not own.is_file():
        raise ModelError(
            f"there is no config.yaml in {directory} that says how the model was trained",
            "give the run's with --config",
        )
    return own if given is None else given
