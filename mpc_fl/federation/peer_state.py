"""What a hospital has over the rounds of a run among peers, and how it goes back where a round came to nothing.

`common` is what an aggregator would have: the global model, its optimizer, and what was opened. Each hospital has it and steps it
by itself, with the same arithmetic; its digest (`digest_of_common`) is said before every round, so that all are known to have
the same, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpc_fl.aggregation.transcript import digest_of
from mpc_fl.audit.ledger_file import RevealLedger, tensor_digest
from mpc_fl.errors import MpcFlError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.attendance import COMMON
from mpc_fl.federation.audit_trail import signed_model
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.parameters import flatten_buffers, load_flat_buffers


@dataclass
class Peer:
    """One hospital: what stays at this site, and what all have in common. `digests` are those of `common`."""

    hospital: Hospital
    common: Aggregator


def first_state(hospital: Hospital, common: Aggregator) -> Peer:
    """Before the first round: the same model in both, made from the configuration alone."""
    normalisation = None if common.normalisation is None else common.normalisation.tensor()
    statistics = flatten_buffers(common.model)
    common.digests.take(parameters=common.shared_parameters, statistics=statistics, normalisation=normalisation)
    if common.normalisation is not None:
        hospital.normalise(common.normalisation)
    return Peer(hospital, common)


def checkpoint(peer: Peer, directory: Path, number: int) -> None:
    """Keep what all have in common after round `number`, and what is this hospital's own."""
    peer.hospital.checkpoint(directory, number)
    peer.common.checkpoint(directory / COMMON, number)


def resume(peer: Peer, directory: Path, ledger: RevealLedger) -> int:
    """Go back to the state after the last round that all have signed, by this hospital's ledger; its number, -1 for none.

    Raises `MpcFlError` where it was not kept, or is not what was signed.
    """
    numbers = range(peer.common.config.last_round, -1, -1)
    number = next((each for each in numbers if signed_model(ledger, each) is not None), -1)
    if number < 0:
        return number
    common, hospital = peer.common, peer.hospital
    found = common.resume(directory / COMMON, lambda each: signed_model(ledger, each))
    if not found or common.round != number:
        raise MpcFlError(f"{directory} holds no state after round {number}", "remove it and start the run anew")
    statistics = flatten_buffers(common.model)
    normalisation = None if common.normalisation is None else common.normalisation.tensor()
    common.digests.take(parameters=common.shared_parameters, statistics=statistics, normalisation=normalisation)
    load_flat_buffers(hospital.model, statistics)
    if common.normalisation is not None:
        hospital.normalise(common.normalisation)
    hospital.take_global(common.shared_parameters)
    hospital.calibration = common.calibration
    hospital.resume(directory, number)
    return number


def digest_of_common(common: Aggregator) -> str:
    """SHA-256 of all that hospitals have in common."""
    numbers = [common.patients, common.counted, common.weight_total]
    tensors = {"optimizer": common.optimizer.state(), "average": common.average.state()}
    states = {part: {name: tensor_digest(value) for name, value in of.items()} for part, of in tensors.items()}
    return digest_of([vars(common.digests), numbers, states])


@dataclass(frozen=True, repr=False)
class KeptState:
    """A hospital's state after the last block, to go back to."""

    common: Aggregator
    model: Mapping[str, torch.Tensor]
    velocity: torch.Tensor | None
    train: Dataset
    test: Dataset
    validation: Dataset | None
    normalisation: Normalisation | None

    @classmethod
    def of(cls, peer: Peer) -> KeptState:
        """The state as it is now."""
        hospital = peer.hospital
        model = {name: value.detach().clone() for name, value in hospital.model.state_dict().items()}
        own = (hospital.train, hospital.test, hospital.validation, hospital.normalisation)
        return cls(_copied(peer.common), model, hospital.velocity, *own)

    def restore(self, peer: Peer) -> None:
        """Go back to it, as often as it takes."""
        peer.common, hospital = _copied(self.common), peer.hospital
        hospital.model.load_state_dict(dict(self.model))
        hospital.velocity, hospital.normalisation = self.velocity, self.normalisation
        hospital.calibration = self.common.calibration
        hospital.train, hospital.test, hospital.validation = self.train, self.test, self.validation


def _copied(common: Aggregator) -> Aggregator:
    return replace(
        common,
        model=copy.deepcopy(common.model),
        optimizer=copy.deepcopy(common.optimizer),
        average=copy.deepcopy(common.average),
        choice=copy.deepcopy(common.choice),
        digests=replace(common.digests),
    )
