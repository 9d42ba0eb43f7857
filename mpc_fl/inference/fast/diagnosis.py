"""A diagnosis with the engine `fast`, as the configuration of either party asks for it: sessions, pools, batches of images.

`online.hospital_session` and `online.owner_session` are the two sides of the protocol; here they are made from a `Config`
and, at the hospital, given images batch by batch. It serves one diagnosis between three processes (`inference.diagnosis`)
and sessions with a model owner that stays up (`serving`) alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from mpc_fl.audit.opening_record import Record
from mpc_fl.config.config import Config
from mpc_fl.errors import ConfigError, ProtocolError
from mpc_fl.free_memory import give_back_free_memory
from mpc_fl.inference.fast.network import RING_BITS, IntegerModel, Network
from mpc_fl.inference.fast.online.hospital_session import AskingGate, HospitalSession
from mpc_fl.inference.fast.online.owner_session import BatchGate, OwnerSession, SessionTerms
from mpc_fl.inference.fast.preprocessing.party_pools import HospitalPool, OwnerPool
from mpc_fl.inference.fast.preprocessing.pool import Purpose
from mpc_fl.inference.fast.quantization.calibration import calibrate
from mpc_fl.inference.inputs import ModelInputs, calibration_images
from mpc_fl.inference.results import Diagnosis
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.links.links import Links
from mpc_fl.progress import Notify
from mpc_fl.roles import HOSPITAL, MODEL_OWNER
from mpc_fl.sharing.opening import SecretDomain

PartyPool = TypeVar("PartyPool", HospitalPool, OwnerPool)


def session_domain(links: Links, hospital: str, record: Record) -> SecretDomain:
    """The secret domain of a session: `hospital` and the model owner open results to the hospital, and write them down."""
    return SecretDomain(links, [hospital, MODEL_OWNER], record)


# ---- both ----------------------------------------------------------------------------------------------------------


def pool_of(
    config: Config, kind: type[PartyPool], party: str, counterpart: str, filling: bool
) -> AbstractContextManager[PartyPool | None]:
    """This party's half of its pool with the other in `site.pool`, to fill or to use; None to use when it keeps none."""
    inference, directory = config.inference, config.site.pool
    if directory is None:
        if filling:
            raise ConfigError(f"{party} has no place for a pool", "set site.pool to a directory")
        return nullcontext()
    purpose: Purpose = "fill" if filling else "use"
    return kind(directory, party, counterpart, purpose, inference.batch_size, config.reveal)


# ---- model owner ---------------------------------------------------------------------------------------------------


def calibrated(config: Config, model: nn.Module, normalisation: Normalisation | None) -> IntegerModel:
    """The model as integers, with ranges found on `calibration_images`. Raises `HeadroomError`, `DataError`."""
    images = calibration_images(config)
    return integers_of(model, images if normalisation is None else normalisation.apply(images))


def integers_of(model: nn.Module, images: torch.Tensor) -> IntegerModel:
    """The same for ranges found on these images, float32 (N, C, H, W). Raises as `calibrate`."""
    found = calibrate(model, images).integers
    give_back_free_memory()  # of calibration, which needs more than any session
    return found


def answering_session(
    config: Config,
    model: IntegerModel,
    domain: SecretDomain,
    hospital: str,
    pool: OwnerPool | None,
    gate: BatchGate | None = None,
) -> OwnerSession:
    """The model owner's part of a session with `hospital`, as the configuration agrees to."""
    inference = config.inference
    terms = SessionTerms(
        config.reveal, inference.batch_size, inference.at_once, _most_records(config, pool is not None)
    )
    return OwnerSession(domain, hospital, model, terms, pool, gate)


def _most_records(config: Config, in_whole_batches: bool) -> int | None:
    """Of a single diagnosis: `inference.limit`, and with a pool whole batches of it. A server has quotas of its own."""
    inference = config.inference
    if inference.limit is None or config.task != "infer":
        return None
    if in_whole_batches:
        return -(-inference.limit // inference.batch_size) * inference.batch_size
    return inference.limit


def answer(config: Config, model: nn.Module, normalisation: Normalisation | None, links: Links, record: Record) -> int:
    """The model owner's side of one diagnosis, or of filling a pool: returns the number of batches that were evaluated."""
    integers = calibrated(config, model, normalisation)
    with pool_of(config, OwnerPool, MODEL_OWNER, HOSPITAL, filling=config.inference.fill > 0) as pool:
        domain = session_domain(links, HOSPITAL, record)
        return answering_session(config, integers, domain, HOSPITAL, pool).serve()


# ---- hospital ------------------------------------------------------------------------------------------------------


def asking_session(
    config: Config, links: Links, record: Record, pool: HospitalPool | None, gate: AskingGate | None = None
) -> HospitalSession:
    """The session of the hospital whose links these are; the model owner's part is `answering_session`."""
    return HospitalSession(session_domain(links, links.name, record), config.reveal, pool, gate)


def ask(config: Config, inputs: ModelInputs, links: Links, record: Record, notify: Notify) -> list[Diagnosis]:
    """The hospital's side of one diagnosis: a `Diagnosis` per record of `inputs`."""
    with pool_of(config, HospitalPool, HOSPITAL, MODEL_OWNER, filling=False) as pool:
        return list(diagnose_batches(config, inputs, asking_session(config, links, record, pool), notify))


def fill_pool(config: Config, links: Links, record: Record, notify: Notify) -> None:
    """The hospital's side of a session that stores `inference.fill` batches for later sessions; no image is needed.

    Raises `PoolError` when the model owner does not hold the other half of this pool.
    """
    with pool_of(config, HospitalPool, HOSPITAL, MODEL_OWNER, filling=True) as pool:
        fill_with(config, asking_session(config, links, record, pool), notify)


def fill_with(config: Config, session: HospitalSession, notify: Notify) -> None:
    """Store `inference.fill` batches in the pool of the hospital whose `session` this is; it ends with the last."""
    inference = config.inference
    _require_agreed(config, session.network)
    session.fill(inference.fill, inference.batch_size, lambda done: notify("fill pool", done, inference.fill))
    session.finish()


def diagnose_batches(
    config: Config, inputs: ModelInputs, session: HospitalSession, notify: Notify
) -> Iterator[Diagnosis]:
    """One `Diagnosis` per record of `inputs`, batch by batch; the session ends with the last. Raises `ProtocolError`."""
    _require_agreed(config, session.network)
    _require_room(session.network, inputs.largest)
    images = inputs.records.inputs
    count = len(images)
    batches = images.split(config.inference.batch_size) if count else ()  # torch splits nothing into one part
    for start in range(0, len(batches), config.inference.at_once):
        group = batches[start : start + config.inference.at_once]
        notify("encrypted inference", start * config.inference.batch_size, count)
        for batch in group:
            session.prepare(len(batch))
        began = time.monotonic()
        opened = torch.cat(session.diagnose_together(group))
        seconds = (time.monotonic() - began) / len(opened)
        for row in opened:
            if config.reveal == "label":
                yield Diagnosis.of_label(int(row), len(config.data.classes), seconds)
            else:
                yield Diagnosis.of(row.float(), seconds)
    notify("encrypted inference", count, count)
    session.finish()


def _require_agreed(config: Config, network: Network) -> None:
    """The model owner's network must take these records and tell these classes apart."""
    shapes = network.values[network.input].shape, network.values[network.output].shape
    if shapes != (tuple(config.data.input_shape), (len(config.data.classes),)):
        raise ProtocolError(
            "the model owner's network has other inputs or classes", "give both parties one configuration"
        )


def _require_room(network: Network, largest: float) -> None:
    """The model owner's scale must leave room for every input that can be, whatever the images are."""
    if not largest / network.values[network.input].scale < 1 << (RING_BITS - 1):
        raise ProtocolError(
            f"the model owner's network has no room for inputs up to {largest:g}",
            "ask it to calibrate with inputs of the configured range; nothing was sent of any image",
        )
