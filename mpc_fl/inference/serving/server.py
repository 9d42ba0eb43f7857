"""server"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from mpc_fl.audit.opening_record import Opening, OpeningRecord, Record
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import ConfigError, PoolError, RefusedError
from mpc_fl.inference.diagnosis import require_supported
from mpc_fl.inference.fast.diagnosis import (
    answering_session,
    calibrated,
    pool_of,
)
from mpc_fl.inference.fast.network import IntegerWeights, Network
from mpc_fl.inference.fast.preprocessing.dealer import deal
from mpc_fl.inference.fast.preprocessing.party_pools import OwnerPool
from mpc_fl.inference.serving.client import log
from mpc_fl.inference.serving.front import ServiceFront
from mpc_fl.inference.serving.gate import Gate
from mpc_fl.inference.serving.quota import SessionRate, UsageLedger, limits_of
from mpc_fl.inference.serving.service_links import _REFUSED, _identity, _listen, require_servable, session_links
from mpc_fl.inference.serving.turns import Turns
from mpc_fl.inference.serving.visits import Visit, service_digest
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.model_file import load_model, load_normalisation
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links, Observer
from mpc_fl.links.network import NetworkLinks
from mpc_fl.links.party_links import site_directory
from mpc_fl.progress import Notify
from mpc_fl.roles import DEALER, MODEL_OWNER


@dataclass(frozen=True, repr=False)
class ServedModel:
    """What is alike in all sessions: the integer network, its weights, what inputs are normalised with."""

    network: Network
    weights: Private[IntegerWeights]
    normalisation: Normalisation | None


def served_model(config: Config) -> ServedModel:
    """The model of `site.model` as integers. Raises `ConfigError`, `ModelError` or `HeadroomError`."""
    if config.site.model is None:
        raise ConfigError("site.model is not set", "give the path of a model.safetensors with --model")
    require_servable(config)
    model = load_model(config.site.model, config)
    require_supported(config, model)
    normalisation = load_normalisation(config.site.model, config)
    calibration = calibrated(config, model, normalisation)
    return ServedModel(calibration.network, calibration.weights, normalisation)


class _OneByOne:
    """An opening record that several sessions share."""

    def __init__(self, record: Record) -> None:
        self._record, self._guard = record, threading.Lock()

    def append(self, opening: Opening) -> object:
        with self._guard:
            return self._record.append(opening)


def answer_hospital(config: Config, model: ServedModel, links: Links, visit: Visit, gate: Gate, record: Record) -> None:
    """One session: as many batches as the hospital asks for and its limits allow, answered or stored in its pool."""
    hospital, filling = visit.hospital, visit.purpose == "fill"
    try:
        if model.normalisation is not None and not filling:
            links.send_tensor(hospital, "normalisation", model.normalisation.tensor())
        with gate.session(), pool_of(config, OwnerPool, MODEL_OWNER, hospital, filling) as pool:
            if pool is not None and not filling and not _fits(pool, model):
                pool = None
            answering_session(config, model, links, hospital, record, pool, gate).serve()
    except RefusedError as error:
        links.send_object(hospital, _REFUSED, {"why": str(error)})
        raise


def _fits(pool: OwnerPool, model: ServedModel) -> bool:
    """Whether a hospital's pool was filled for this model. If not, it is served by the dealer, and the log says why."""
    try:
        pool.offer(model.network, model.weights.inside_protocol())
    except PoolError as error:
        log.warning("the dealer is asked: %s", error)
        return False
    return True


def serve_model(config: Config, notify: Notify, until: Callable[[], None], observer: Observer | None = None) -> None:
    """The model owner: serve hospitals until `until` returns or raises. Raises `MpcFlError` for what prevents a start."""
    identity, out, listen = _identity(config, MODEL_OWNER), site_directory(config), _listen(config, MODEL_OWNER)
    model, serving = served_model(config), config.serving
    notify("load model", 1, 1)
    usage, turns = UsageLedger(out, limits_of(config)), Turns(serving.turns, serving.patience)
    record = _OneByOne(OpeningRecord(out / "openings.jsonl", MODEL_OWNER))

    def make_links(visit: Visit, agreement: Agreement) -> NetworkLinks:
        if visit.purpose == "diagnose":
            usage.require(visit.hospital)
        elif config.site.pool is None:
            raise RefusedError("this model owner keeps no pools", "ask it to set site.pool")
        return session_links(identity, config, visit.hospital, agreement, serving.deadline, observer)

    def serve(links: Links, visit: Visit) -> None:
        gate = Gate(visit, turns, usage, serving.pool_batches, links.require_all)
        answer_hospital(config, model, links, visit, gate, record)

    digest, rate = service_digest(config), SessionRate(serving.sessions_per_minute)
    try:
        with ServiceFront(identity, listen, digest, set(), serving.sessions, rate, make_links, serve):
            notify("serving", 1, 1)
            until()
    finally:
        usage.close()


def serve_correlations(
    config: Config, notify: Notify, until: Callable[[], None], observer: Observer | None = None
) -> None:
    """The dealer: deal in every session of a hospital with the model owner until `until` returns or raises."""
    require_servable(config)
    identity, listen = _identity(config, DEALER), _listen(config, DEALER)

    def make_links(visit: Visit, agreement: Agreement) -> NetworkLinks:
        return session_links(identity, config, visit.hospital, agreement, config.runtime.receive_timeout, observer)

    def serve(links: Links, visit: Visit) -> None:
        deal(links, visit.hospital, MODEL_OWNER)

    digest, sessions = service_digest(config), config.serving.sessions
    rate = SessionRate(config.serving.sessions_per_minute)
    with ServiceFront(identity, listen, digest, {MODEL_OWNER}, sessions, rate, make_links, serve):
        notify("serving", 1, 1)
        until()
