"""diagnosis"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

import torch
from torch import nn

from mpc_fl.audit.opening_record import Record
from mpc_fl.config.config import Config
from mpc_fl.crypto.secrecy import Private
from mpc_fl.errors import ConfigError, ProtocolError
from mpc_fl.inference.fast.network import IntegerWeights, Network
from mpc_fl.inference.fast.online.hospital_session import HospitalSession
from mpc_fl.inference.fast.online.owner_session import BatchGate, OwnerSession
from mpc_fl.inference.fast.preprocessing.party_pools import HospitalPool, OwnerPool
from mpc_fl.inference.fast.preprocessing.pool import Purpose
from mpc_fl.inference.fast.quantization.calibration import Calibration, calibrate
from mpc_fl.inference.inputs import calibration_images
from mpc_fl.inference.results import Diagnosis
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.links.links import Links
from mpc_fl.progress import Notify
from mpc_fl.roles import DEALER, HOSPITAL, MODEL_OWNER
from mpc_fl.sharing.crypten_runtime import CrypTenRuntime
from mpc_fl.sharing.opening import SecretDomain


class IntegerModel(Protocol):
    """What a session needs of a model: a `Calibration`, or what a model owner that stays up keeps of one."""

    @property
    def network(self) -> Network:
        """The public network."""

    @property
    def weights(self) -> Private[IntegerWeights]:
        """The owner's."""


def calibrated(config: Config, model: nn.Module, normalisation: Normalisation | None) -> Calibration:
    """The model as integers, with ranges found on `calibration_images`. Raises `HeadroomError`, `DataError`."""
    images = calibration_images(config)
    return calibrate(model, images if normalisation is None else normalisation.apply(images))


def _domain_without_crypten(links: Links, hospital: str, record: Record) -> SecretDomain:
    """`open_to` needs the zero-shares of a runtime; CrypTen itself stays as it is."""
    return SecretDomain(CrypTenRuntime(links, [hospital, MODEL_OWNER], None, 0), record)


P = TypeVar("P", HospitalPool, OwnerPool)


def pool_of(
    config: Config, kind: type[P], party: str, counterpart: str, filling: bool
) -> AbstractContextManager[P | None]:
    """This party's half of its pool with the other in `site.pool`, to fill or to use; None to use when it keeps none."""
    inference, directory = config.inference, config.site.pool
    if directory is None:
        if filling:
            raise ConfigError(f"{party} has no place for a pool", "set site.pool to a directory")
        return nullcontext()
    purpose: Purpose = "fill" if filling else "use"
    return kind(directory, party, counterpart, purpose, inference.batch_size, inference.reveal)


def asking_session(config: Config, links: Links, record: Record, pool: HospitalPool | None) -> HospitalSession:
    """The session of the hospital whose links these are; the model owner's part is `answering_session`."""
    domain = _domain_without_crypten(links, links.name, record)
    return HospitalSession(domain, MODEL_OWNER, DEALER, config.inference.reveal, pool)


def answering_session(
    config: Config,
    model: IntegerModel,
    links: Links,
    hospital: str,
    record: Record,
    pool: OwnerPool | None,
    gate: BatchGate | None = None,
) -> OwnerSession:
    """The model owner's part of a session with `hospital`, as the configuration agrees to."""
    domain, inference = _domain_without_crypten(links, hospital, record), config.inference
    agreed = inference.reveal, inference.batch_size
    network, weights = model.network, model.weights.inside_protocol()
    return OwnerSession(domain, hospital, DEALER, network, weights, *agreed, pool, inference.at_once, gate)


def fill_pool(config: Config, links: Links, record: Record, notify: Notify) -> None:
    """The hospital's side of a session that stores `inference.fill` batches for later sessions; no image is needed.

    Raises `PoolError` when the model owner does not hold the other half of this pool.
    """
    with pool_of(config, HospitalPool, HOSPITAL, MODEL_OWNER, filling=True) as pool:
        fill_with(config, asking_session(config, links, record, pool), notify)


def fill_with(config: Config, hospital: HospitalSession, notify: Notify) -> None:
    """Store `inference.fill` batches in the pool of a hospital whose session has begun; the session ends with the last."""
    inference = config.inference
    _require_agreed(config, hospital.network)
    hospital.fill(inference.fill, inference.batch_size, lambda done: notify("fill pool", done, inference.fill))
    hospital.finish()


def diagnose_batches(config: Config, images: Dataset, hospital: HospitalSession, notify: Notify) -> Iterator[Diagnosis]:
    """One `Diagnosis` per record of `images`, batch by batch; the session ends with the last. Raises `ProtocolError`."""
    _require_agreed(config, hospital.network)
    count = len(images.inputs)
    batches = images.inputs.split(config.inference.batch_size) if count else ()  # torch splits nothing into one part
    for start in range(0, len(batches), config.inference.at_once):
        group = batches[start : start + config.inference.at_once]
        notify("encrypted inference", start * config.inference.batch_size, count)
        for batch in group:
            hospital.prepare(len(batch))
        began = time.monotonic()
        opened = torch.cat(hospital.diagnose_together(group))
        seconds = (time.monotonic() - began) / len(opened)
        for row in opened:
            if config.inference.reveal == "label":
                yield Diagnosis(None, seconds, int(row))
            else:
                yield Diagnosis.of(row.float(), seconds)
    notify("encrypted inference", count, count)
    hospital.finish()


def _require_agreed(config: Config, network: Network) -> None:
    """The model owner's network must take these records and tell these classes apart."""
    shapes = network.values[network.input].shape, network.values[network.output].shape
    if shapes != (tuple(config.data.input_shape), (len(config.data.classes),)):
        raise ProtocolError(
            "the model owner's network has other inputs or classes", "give both parties one configuration"
        )
