"""The model owner that stays up: one integer model, sessions of several hospitals, each behind a gate of its own.

`serve_model` loads and calibrates the model once, then `front` admits sessions and calls `ModelService` for each: links to this
hospital and the dealer, and `answer_hospital`, which tells a hospital why when a gate refuses it.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mpc_fl.audit.model_origin import model_origin
from mpc_fl.audit.opening_record import Opening, OpeningRecord, Record
from mpc_fl.audit.receipt_file import ReceiptFile
from mpc_fl.config.config import Config
from mpc_fl.crypto.certificates import Identity
from mpc_fl.errors import ConfigError, MpcFlError, PoolError, RefusedError
from mpc_fl.files import written_whole
from mpc_fl.inference.diagnosis import require_supported
from mpc_fl.inference.fast.diagnosis import answering_session, calibrated, pool_of, session_domain
from mpc_fl.inference.fast.messages import network_digest
from mpc_fl.inference.fast.network import IntegerModel, label_bits
from mpc_fl.inference.fast.preprocessing.party_pools import OwnerPool, weights_digest
from mpc_fl.inference.inputs import send_calibration
from mpc_fl.inference.serving.front import Admission, ServiceFront
from mpc_fl.inference.serving.gate import SessionGate, SignedGate
from mpc_fl.inference.serving.quota import SessionRate, UsageLedger, quotas_of
from mpc_fl.inference.serving.receipt_exchange import OwnerReceipts, ServedTerms
from mpc_fl.inference.serving.service_links import REFUSED, require_servable, session_links, standing_party
from mpc_fl.inference.serving.service_records import open_records
from mpc_fl.inference.serving.turns import Turns
from mpc_fl.inference.serving.visits import Visit
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.calibration import Calibration
from mpc_fl.learning.models.class_offsets import with_offsets
from mpc_fl.learning.models.model_file import load_calibration, load_model, load_normalisation, note_on_films
from mpc_fl.links.frames import Observer
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.party_links import site_directory
from mpc_fl.progress import Notify
from mpc_fl.roles import MODEL_OWNER

log = logging.getLogger(__name__)

COMMITMENT_KEY = "commitment.key"  # file: who has it and the weights can check the commitment of a receipt
_KEY_BYTES = 32


@dataclass(frozen=True)
class ServedModel(IntegerModel):
    """What is alike in all sessions: the integer network, its weights, what inputs are normalised and logits calibrated with.

    `commitment` is to the weights, empty until `commitment_to` has made one.
    """

    normalisation: Normalisation | None
    commitment: str = ""
    calibration: Calibration | None = None


def served_model(config: Config) -> ServedModel:
    """The model of `site.model` as integers. Raises `ConfigError`, `ModelError` or `HeadroomError`."""
    if config.site.model is None:
        raise ConfigError("site.model is not set", "give the path of a model.safetensors with --model")
    require_servable(config)
    model = load_model(config.site.model, config)
    require_supported(config, model)
    normalisation = load_normalisation(config.site.model, config)
    calibration = load_calibration(config.site.model, config)
    integers = calibrated(config, with_offsets(model, config, calibration), normalisation)
    return ServedModel(integers.network, integers.weights, normalisation, calibration=calibration)


def say_what_is_revealed(config: Config, model: ServedModel) -> None:
    """Log it: logits are the model owner's choice, and a choice with a price. Raises `ModelError` when it cannot be revealed."""
    if config.reveal == "label":
        label_bits(model.network)
        log.info("hospitals get the label alone (inference.reveal)")
        return
    log.warning(
        "hospitals get LOGITS, because this model owner's configuration says inference.reveal=logits: a hospital that deviates "
        "takes the last layer's weights from one image more than that layer has inputs; the label alone is the default"
    )


class _OneByOne:
    """An opening record that several sessions share."""

    def __init__(self, record: Record) -> None:
        self._record, self._guard = record, threading.Lock()

    def append(self, opening: Opening) -> object:
        with self._guard:
            return self._record.append(opening)


def commitment_to(model: ServedModel, directory: Path) -> str:
    """A commitment to the weights, as hex: HMAC-SHA256 under a key that `directory` keeps, so it is the same at each start.

    It hides the weights from who does not have the key, and binds the model owner to them, if it is ever asked to show both.
    Raises `MpcFlError` when the key cannot be read or written.
    """
    path = directory / COMMITMENT_KEY
    try:
        if not path.exists():
            with written_whole(path, durable=True, once=True) as temporary:  # processes that share it have one
                temporary.write_bytes(secrets.token_bytes(_KEY_BYTES))
        key = path.read_bytes()
    except OSError as error:
        raise MpcFlError(f"cannot read {path}: {error.strerror}", "check the path") from None
    if len(key) != _KEY_BYTES:
        raise MpcFlError(f"{path} is damaged", "restore it; without it receipts name weights that nobody can show")
    return hmac.digest(key, weights_digest(model.weights.inside_protocol()), "sha256").hex()


def answer_hospital(
    config: Config, model: ServedModel, links: Links, visit: Visit, gate: SessionGate, receipts: OwnerReceipts
) -> None:
    """One session: as many batches as the hospital asks for and its limits allow, answered or stored in its pool."""
    hospital, filling = visit.hospital, visit.purpose == "fill"
    try:
        receipts.meet(ServedTerms(config.reveal, network_digest(model.network), model.commitment))
        if model.normalisation is not None and not filling:
            links.send_tensor(hospital, "normalisation", model.normalisation.tensor())
        if not filling:
            send_calibration(config, links, hospital, model.calibration)
        with gate.session(), pool_of(config, OwnerPool, MODEL_OWNER, hospital, filling) as pool:
            if pool is not None and not filling and not _fits(pool, model):
                pool = None
            domain = session_domain(links, hospital, receipts.record)
            answering_session(config, model, domain, hospital, pool, SignedGate(gate, receipts)).serve()
    except RefusedError as error:
        links.send_object(hospital, REFUSED, {"why": str(error)})
        raise


def _fits(pool: OwnerPool, model: ServedModel) -> bool:
    """Whether a hospital's pool was filled for this model. If not, it is served by the dealer, and the log says why."""
    try:
        pool.offer(model.network, model.weights.inside_protocol())
    except PoolError as error:
        log.warning("the dealer is asked: %s", error)
        return False
    return True


class ModelService:
    """The model owner's `Service`: what all sessions share are the model, turns, the usage of each hospital and the record.

    `directory` holds receipts and what was opened. Several processes may share it, and the usage.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        model: ServedModel,
        directory: Path,
        usage: UsageLedger,
        observer: Observer | None = None,
    ) -> None:
        self._config, self._identity, self._model, self._observer = config, identity, model, observer
        self._usage = usage
        self._turns = Turns(config.serving.turns, config.serving.patience)
        self._receipts = ReceiptFile(directory, identity)
        self._record = _OneByOne(OpeningRecord(directory / "openings.jsonl", MODEL_OWNER))

    def make_links(self, visit: Visit, agreement: Agreement) -> NetworkLinks:
        """Raises `RefusedError` for a hospital whose quota is used up, and for a pool that is not kept."""
        if visit.purpose == "diagnose":
            self._usage.require(visit.hospital)
        elif self._config.site.pool is None:
            raise RefusedError("this model owner keeps no pools", "ask it to set site.pool")
        deadline = self._config.serving.deadline
        return session_links(self._identity, self._config, visit.hospital, agreement, deadline, self._observer)

    def serve(self, links: Links, visit: Visit) -> None:
        """See `answer_hospital`."""
        batches = self._config.serving.pool_batches
        gate = SessionGate(visit, self._turns, self._usage, batches, links.require_all)
        receipts = OwnerReceipts(links, visit.hospital, self._identity, self._receipts, self._record)
        answer_hospital(self._config, self._model, links, visit, gate, receipts)


def serve_model(config: Config, notify: Notify, until: Callable[[], None], observer: Observer | None = None) -> None:
    """The model owner: serve hospitals until `until` returns or raises. Raises `MpcFlError` for what prevents a start."""
    party, out, serving = standing_party(config, MODEL_OWNER), site_directory(config), config.serving
    model, site = served_model(config), config.site
    assert site.model is not None  # `served_model` has read it
    origin = model_origin(site.model, site.reveal_ledger, site.authority)
    log.log(logging.INFO if origin.signed else logging.WARNING, "the model file %s", origin.words)
    if note := note_on_films(site.model, config):
        log.warning("%s", note)
    model = replace(model, commitment=commitment_to(model, out))
    say_what_is_revealed(config, model)
    notify("load model", 1, 1)
    with open_records(out, MODEL_OWNER) as records:
        usage, rate = UsageLedger(records, quotas_of(config)), SessionRate(records, serving.sessions_per_minute)
        service = ModelService(config, party.identity, model, out, usage, observer)
        with ServiceFront(party, Admission(frozenset(), serving.sessions, rate), service):
            notify("serving", 1, 1)
            until()
