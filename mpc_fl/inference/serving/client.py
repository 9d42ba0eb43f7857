"""Sessions with a model owner that stays up: the model owner's, the dealer's and the hospital's part. Engine `fast` only.

  hospital      makes a fresh session name, dials model owner and dealer, asks about its images batch by batch
  model owner   dials the dealer in every session that a hospital begins; says before each batch whose turn it is and whether
                the hospital's limits allow it (`serving`); otherwise tells it when to come back and ends the session
  dealer        serves both as in any diagnosis

The protocol between them is that of `fast.sessions`, with masks, seeds and masked weights of this session alone. The model
owner learns which hospital asks, when and about how many images; other hospitals learn nothing but waiting times.

Where hospital and model owner have a `site.pool` each, batches come from there as in any diagnosis with pools; the masked
weights are then the pool's, each hospital's its own. A session of another kind fills it (`fill_from_service`), also while
the hospital diagnoses; then only batches that were there when the diagnosis began are used by it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpc_fl.audit.reveal_ledger import Scalar
from mpc_fl.config.config import DEALER, Config
from mpc_fl.crypto.certificates import Identity, load_identity
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import ConfigError, IdentityError, PeerLostError, PoolError, RefusedError
from mpc_fl.federation.feature_statistics import Normalisation
from mpc_fl.federation.hospital_round import Notify
from mpc_fl.inference.diagnosis import (
    MODEL_OWNER,
    Diagnosis,
    answering_session,
    as_the_model_takes_them,
    asking_session,
    calibrated,
    diagnose_batches,
    fill_with,
    pool_of,
    require_supported,
)
from mpc_fl.inference.fast.network import Network
from mpc_fl.inference.fast.preprocessing.dealer import deal
from mpc_fl.inference.fast.preprocessing.party_pools import HospitalPool, OwnerPool
from mpc_fl.inference.fast.quantization.lowering import IntegerWeights
from mpc_fl.inference.serving.front import TASK, ServiceFront
from mpc_fl.inference.serving.gate import Gate, SessionRate, Turns, UsageLedger, Visit, limits_of, service_digest
from mpc_fl.learning.data.loading import Dataset
from mpc_fl.learning.models.model_file import load_model, load_normalisation
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links, Observer
from mpc_fl.links.party_links import site_directory
from mpc_fl.links.routes import routes
from mpc_fl.sharing.opening import OpeningRecord, Record

log = logging.getLogger(__name__)

_REFUSED = "refused"
_LAST_WORD = 2.0  # seconds in which the reason of a refusal may arrive after the session has ended otherwise


# ---- all -----------------------------------------------------------------------------------------------------------


def require_servable(config: Config) -> None:
    """Raise `ConfigError` unless the configuration can be served: the engine `fast`, on images."""
    if config.inference.engine != "fast":
        raise ConfigError("only the engine fast can be served", "set inference.engine=fast")


def session_links(
    identity: Identity,
    config: Config,
    hospital: str,
    agreement: Agreement,
    deadline: float,
    observer: Observer | None = None,
) -> Links:
    """This party's links in a session of `hospital`: the hospital dials both others, the model owner the dealer.

    Nothing is listened on: at model owner and dealer `ServiceFront` hands in who dials. Raises `ConfigError`.
    """
    addresses = {name: config.federation.addresses.get(name, "") for name in (DEALER, MODEL_OWNER)}
    for name, address in addresses.items():
        if not address and identity.name != name:
            raise ConfigError(f"federation.addresses has no entry for {name}", "give its host:port")
    peers = routes(identity.name, [hospital, DEALER, MODEL_OWNER], addresses, None)
    return Links(identity, None, peers, agreement, config.runtime.connect_timeout, deadline, observer)


def _identity(config: Config, name: str) -> Identity:
    if config.site.identity is None:
        raise ConfigError("site.identity is not set", "say with --identity where this party's key and certificate lie")
    return load_identity(config.site.identity, name)


def _listen(config: Config, name: str) -> str:
    listen = config.site.listen or config.federation.addresses.get(name)
    if listen is None:
        raise ConfigError(f"federation.addresses has no entry for {name}", "give host:port for every party that serves")
    return listen


# ---- model owner ---------------------------------------------------------------------------------------------------


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

    def append(
        self,
        what: str,
        why: str,
        shape: Sequence[int],
        to: Sequence[str],
        among: Sequence[str],
        privacy: Mapping[str, Scalar] | None = None,
    ) -> object:
        with self._guard:
            return self._record.append(what, why, shape, to, among, privacy)


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

    def make_links(visit: Visit, agreement: Agreement) -> Links:
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


# ---- dealer --------------------------------------------------------------------------------------------------------


def serve_correlations(
    config: Config, notify: Notify, until: Callable[[], None], observer: Observer | None = None
) -> None:
    """The dealer: deal in every session of a hospital with the model owner until `until` returns or raises."""
    require_servable(config)
    identity, listen = _identity(config, DEALER), _listen(config, DEALER)

    def make_links(visit: Visit, agreement: Agreement) -> Links:
        return session_links(identity, config, visit.hospital, agreement, config.runtime.receive_timeout, observer)

    def serve(links: Links, visit: Visit) -> None:
        deal(links, visit.hospital, MODEL_OWNER)

    digest, sessions = service_digest(config), config.serving.sessions
    rate = SessionRate(config.serving.sessions_per_minute)
    with ServiceFront(identity, listen, digest, {MODEL_OWNER}, sessions, rate, make_links, serve):
        notify("serving", 1, 1)
        until()


# ---- hospital ------------------------------------------------------------------------------------------------------


def hospital_in(directory: Path) -> str:
    """The hospital whose certificate lies in an identity directory. Raises `IdentityError` when there is not just one."""
    names = sorted(path.stem for path in directory.glob("hospital-*.crt"))
    if len(names) != 1:
        what = "no hospital's certificate" if not names else f"certificates of {' and '.join(names[:2])}"
        raise IdentityError(f"there is {what} in {directory}", "give a directory with the identity of one hospital")
    return names[0]


def asking(config: Config, server: str | None, dealer: str | None) -> Config:
    """The configuration of a hospital that asks these addresses, and for those not given the configured ones."""
    given = {name: address for name, address in ((MODEL_OWNER, server), (DEALER, dealer)) if address is not None}
    return config.with_values(federation={"addresses": {**config.federation.addresses, **given}})


def asking_hospital(config: Config) -> str:
    """The hospital that `site.identity` makes this process. Raises `ConfigError` or `IdentityError`."""
    if config.site.identity is None:
        raise ConfigError(
            "site.identity is not set", "say with --identity where this hospital's key and certificate lie"
        )
    return hospital_in(config.site.identity)


def links_to_service(config: Config, visit: Visit, observer: Observer | None = None) -> Links:
    """A new session of a hospital; enter the links to connect."""
    require_servable(config)
    agreement, name = Agreement(visit.new_session(), service_digest(config), TASK), visit.hospital
    return session_links(_identity(config, name), config, name, agreement, config.runtime.receive_timeout, observer)


def ask_service(
    config: Config, images: Dataset, links: Links, record: Record, notify: Notify
) -> tuple[list[Diagnosis], RefusedError | None]:
    """One `Diagnosis` for each of the first records of `images`: of all, or of as many as the limits allowed.

    The refusal then says when to come back. Raises it when there is no diagnosis at all; `PeerLostError` for a lost party.
    """
    found: list[Diagnosis] = []
    try:
        with (
            _explained(links),
            pool_of(config, HospitalPool, links.name, MODEL_OWNER, filling=False) as pool,
        ):
            images = as_the_model_takes_them(config, images, links)
            hospital = asking_session(config, links, record, pool)
            for diagnosis in diagnose_batches(config, images, hospital, notify):
                found.append(diagnosis)  # kept also when the next batch is refused
    except RefusedError as error:
        if not found:
            raise
        return found, error
    return found, None


def fill_from_service(config: Config, links: Links, record: Record, notify: Notify) -> None:
    """Store `inference.fill` batches in this hospital's pool and in the one that the model owner keeps for it.

    Raises `RefusedError` when the model owner keeps no more (what was stored until then stays), `PoolError` when the two halves
    do not belong together.
    """
    with _explained(links), pool_of(config, HospitalPool, links.name, MODEL_OWNER, filling=True) as pool:
        fill_with(config, asking_session(config, links, record, pool), notify)


class _explained:
    """Inside, the end of a session that the model owner explained as a refusal is a `RefusedError`."""

    def __init__(self, links: Links) -> None:
        self._links = links

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if not isinstance(error, PeerLostError):
            return
        # The dealer may have ended before the model owner's word is here.
        deadline = time.monotonic() + _LAST_WORD
        while not self._links.waiting(MODEL_OWNER, _REFUSED):
            if not self._links.alive(MODEL_OWNER) or time.monotonic() > deadline:
                return
            self._links.await_change(0.1)
        raise RefusedError(str(self._links.receive_object(MODEL_OWNER, _REFUSED).get("why"))[:300]) from None
