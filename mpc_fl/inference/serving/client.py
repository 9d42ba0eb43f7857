"""A hospital's part in a session with a model owner that stays up: it dials, asks, and understands a refusal.

  hospital      makes a fresh session name, dials model owner and dealer, asks about its images batch by batch
  model owner   dials the dealer in every session that a hospital begins; says before each batch whose turn it is and whether
                the hospital's quota allows it (`gate`); otherwise tells it when to come back and ends the session
  dealer        serves both as in any diagnosis

The protocol between them is that of `fast.online.hospital_session`, with masks, seeds and masked weights of this session alone.
The model owner learns which hospital asks, when and about how many images; other hospitals learn nothing but waiting times.

Where hospital and model owner have a `site.pool` each, batches come from there as in any diagnosis with pools; the masked
weights are then the pool's, each hospital's its own. A session of another kind fills it (`fill_from_service`), also while
the hospital diagnoses; then only batches that were there when the diagnosis began are used by it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mpc_fl.audit.opening_record import Record
from mpc_fl.audit.receipt_file import ReceiptFile
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, IdentityError, PeerLostError, RefusedError
from mpc_fl.inference.fast.diagnosis import asking_session, diagnose_batches, fill_with, pool_of
from mpc_fl.inference.fast.messages import network_digest
from mpc_fl.inference.fast.online.hospital_session import HospitalSession
from mpc_fl.inference.fast.preprocessing.party_pools import HospitalPool
from mpc_fl.inference.inputs import as_the_model_takes_them, calibration_of_model
from mpc_fl.inference.results import Diagnosis
from mpc_fl.inference.serving.receipt_exchange import HospitalReceipts
from mpc_fl.inference.serving.service_links import REFUSED, identity_of, require_servable, session_links
from mpc_fl.inference.serving.visits import TASK, Visit, service_digest
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.links.frames import Observer
from mpc_fl.links.handshake import Agreement
from mpc_fl.links.links import Links
from mpc_fl.links.party_links import site_directory
from mpc_fl.progress import Notify
from mpc_fl.roles import DEALER, MODEL_OWNER, is_hospital

_LAST_WORD = 2.0  # seconds in which the reason of a refusal may arrive after the session has ended otherwise


def hospital_in(directory: Path) -> str:
    """The hospital whose certificate lies in an identity directory. Raises `IdentityError` when there is not just one."""
    names = sorted(path.stem for path in directory.glob("*.crt") if is_hospital(path.stem))
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
    return session_links(identity_of(config, name), config, name, agreement, config.runtime.receive_timeout, observer)


def ask_service(
    config: Config, images: Dataset, links: Links, record: Record, notify: Notify
) -> tuple[list[Diagnosis], RefusedError | None]:
    """One `Diagnosis` for each of the first records of `images`: of all, or of as many as the limits allowed.

    The refusal then says when to come back. Raises it when there is no diagnosis at all; `PeerLostError` for a lost party.
    """
    found: list[Diagnosis] = []
    try:
        with _explained(links):
            config, receipts = _met(config, links, record)
            inputs = as_the_model_takes_them(config, images, links)
            calibration = calibration_of_model(config, links)
            with _session(config, links, receipts, filling=False) as session:
                for diagnosis in diagnose_batches(config, inputs, session, notify):
                    found.append(
                        replace(diagnosis, calibration=calibration)
                    )  # kept also when the next batch is refused
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
    with _explained(links):
        config, receipts = _met(config, links, record)
        with _session(config, links, receipts, filling=True) as session:
            fill_with(config, session, notify)


def _met(config: Config, links: Links, record: Record) -> tuple[Config, HospitalReceipts]:
    """The configuration with what the model owner reveals, and what keeps this session's receipts.

    Raises `RefusedError` where the configuration asks for something else.
    """
    identity = identity_of(config, links.name)
    receipts = HospitalReceipts(links, identity, ReceiptFile(site_directory(config), identity), record)
    return config.with_values(inference={"reveal": receipts.meet(config.inference.reveal)}), receipts


@contextlib.contextmanager
def _session(config: Config, links: Links, receipts: HospitalReceipts, filling: bool) -> Iterator[HospitalSession]:
    """The session, with this hospital's pool while it lasts. Raises `PoolError`, `ProtocolError` for another network."""
    with pool_of(config, HospitalPool, links.name, MODEL_OWNER, filling) as pool:
        session = asking_session(config, links, receipts.record, pool, receipts)
        receipts.require_network(network_digest(session.network))
        yield session


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
        while not self._links.waiting(MODEL_OWNER, REFUSED):
            if not self._links.alive(MODEL_OWNER) or time.monotonic() > deadline:
                return
            self._links.await_change(0.1)
        raise RefusedError(str(self._links.receive_object(MODEL_OWNER, REFUSED).get("why"))[:300]) from None
