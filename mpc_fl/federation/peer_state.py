"""What a hospital has over the rounds of a run among peers, and how it goes back where a round came to nothing.

`common` is what an aggregator would have: the global model, its optimizer, and what was opened. Each hospital has it and steps it
by itself, with the same arithmetic; its digest (`digest_of_common`) is said before every round, so that all are known to have
the same, bit for bit.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mpc_fl.aggregation.transcript import digest_of
from mpc_fl.audit.ledger_file import RevealLedger, tensor_digest
from mpc_fl.errors import MpcFlError
from mpc_fl.federation.aggregator_state import Aggregator, prepare_aggregator
from mpc_fl.federation.attendance import COMMON
from mpc_fl.federation.audit_trail import signed_model
from mpc_fl.federation.checkpoint import checkpoint_name
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.preparation import heaviest_weight
from mpc_fl.learning.data.dataset import Dataset
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.parameters import (
    flatten_buffers,
    flatten_parameters,
    join_parts,
    load_flat_buffers,
    load_flat_parameters,
)

_STATES, _HEADER = 6, 1 << 20  # model, up to two moments, an average, with room; names and facts


@dataclass
class Peer:
    """One hospital: what stays at this site, and what all have in common. `digests` are those of `common`."""

    hospital: Hospital
    common: Aggregator


def first_state(hospital: Hospital, common: Aggregator) -> Peer:
    """Before the first round: the same model in both, made from the configuration alone."""
    take_digests(common)
    if common.normalisation is not None:
        hospital.normalise(common.normalisation)
    return Peer(hospital, common)


def take_digests(common: Aggregator) -> torch.Tensor:
    """Take the digests of a state as it stands; its frozen statistics."""
    normalisation = None if common.normalisation is None else common.normalisation.tensor()
    statistics = flatten_buffers(common.model)
    common.digests.take(parameters=common.shared_parameters, statistics=statistics, normalisation=normalisation)
    return statistics


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
    load_flat_buffers(hospital.model, take_digests(common))
    if common.normalisation is not None:
        hospital.normalise(common.normalisation)
    hospital.take_global(common.shared_parameters)
    hospital.calibration = common.calibration
    hospital.resume(directory, number)
    hospital.heaviest = heaviest_weight(common.config, ledger, hospital.name, common.weight_total)
    return number


def given_form(common: Aggregator, number: int) -> torch.Tensor:
    """What all have in common after round `number`, as a hospital that joins is given it: uint8 (B,), B = 0 for number -1."""
    if number < 0:
        return torch.zeros(0, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as directory:
        common.checkpoint(Path(directory), number)
        (path,) = Path(directory).iterdir()
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def largest_given(common: Aggregator) -> int:
    """The most bytes that a state has, by this hospital's own: an optimizer and an average have no more than the model each."""
    return _STATES * sum(value.nbytes for value in common.model.state_dict().values()) + _HEADER


def take_given(peer: Peer, given: torch.Tensor, ledger: RevealLedger, number: int, state: str) -> None:
    """Take what another hospital gave as the common state after round `number`, -1 for before the first one.

    The parameters are held against what all signed, what is not trained against this hospital's own, all against the digest `state`
    that a quorum said. Raises `MpcFlError` where it is not that; nothing is taken then.
    """
    hospital, config = peer.hospital, peer.hospital.config
    common = prepare_aggregator(config)
    try:
        if number >= 0:
            _load_given(common, given, ledger, number)
        fresh = take_digests(common)
        digest = digest_of_common(common)
    except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError, AttributeError):
        # Nobody vouches for it yet, and it is read by what reads this hospital's own files.
        raise _not_that() from None
    if digest != state:
        raise MpcFlError("another state of the run was given than the hospitals have", "the others are asked")
    peer.common = common
    load_flat_buffers(hospital.model, fresh)
    if common.normalisation is not None:
        hospital.normalise(common.normalisation)
    hospital.take_global(common.shared_parameters)
    hospital.velocity = None
    hospital.heaviest = heaviest_weight(config, ledger, hospital.name, common.weight_total)


def _load_given(common: Aggregator, given: torch.Tensor, ledger: RevealLedger, number: int) -> None:
    own, untrained = flatten_parameters(common.model), _untrained(common.model)

    def signed(each: int) -> str | None:
        return signed_model(ledger, each) if each <= number else None

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / checkpoint_name(number)).write_bytes(given.numpy().tobytes())
        found = common.resume(Path(directory), signed)
    if not found or any(not torch.equal(value, untrained[name]) for name, value in _untrained(common.model).items()):
        raise _not_that()
    load_flat_parameters(common.model, join_parts(common.shared_parameters, own, common.coordinates))


def _not_that() -> MpcFlError:
    return MpcFlError("what was given as the state of the run is not that", "the others are asked")


def _untrained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What no sum changes: all must have it from the configuration."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if not value.requires_grad}


def digest_of_common(common: Aggregator) -> str:
    """SHA-256 of all that hospitals have in common: also of the figures by which a round is chosen, and of its candidate."""
    numbers = [common.patients, common.counted, common.weight_total]
    tensors = {
        "optimizer": common.optimizer.state(),
        "average": common.average.state(),
        "choice": common.choice.state(),
    }
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
