"""The global model on its way from the aggregator to hospitals: whole for newcomers, its new parameters after every sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpc_fl.aggregation.words import broadcast
from mpc_fl.config.config import Config
from mpc_fl.errors import SAME_VERSION, DataError, ProtocolError
from mpc_fl.federation.aggregator_state import Aggregator
from mpc_fl.federation.hospital_state import Hospital
from mpc_fl.federation.model_digests import ModelDigests
from mpc_fl.learning.data.normalisation import Normalisation
from mpc_fl.learning.models.calibration import Calibration, Grid
from mpc_fl.learning.models.parameters import (
    flatten_buffers,
    flatten_parameters,
    join_parts,
    load_flat_buffers,
    load_flat_parameters,
)
from mpc_fl.links.links import Links
from mpc_fl.roles import AGGREGATOR


@dataclass(frozen=True)
class GlobalModel:
    """What a hospital begins with: all parameters float32 (P,), frozen statistics float32 (B,), and float64 (2, constants) of the
    normalisation of inputs where it is known."""

    parameters: torch.Tensor
    statistics: torch.Tensor
    normalisation: torch.Tensor | None


def model_to_give(aggregator: Aggregator) -> GlobalModel:
    """The global model as the aggregator gives it, which takes its digests."""
    parameters, statistics = flatten_parameters(aggregator.model), flatten_buffers(aggregator.model)
    normalisation = None if aggregator.normalisation is None else aggregator.normalisation.tensor()
    aggregator.digests.take(parameters=aggregator.shared_parameters, statistics=statistics, normalisation=normalisation)
    return GlobalModel(parameters, statistics, normalisation)


def take_model(hospital: Hospital, given: GlobalModel) -> None:
    """At a hospital: begin with this model.

    Only what all have in common is taken, and bound to the sums to come: own layers are never the aggregator's to choose.
    Raises `ProtocolError` for a normalisation that cannot be, or is another than before.
    """
    own = flatten_parameters(hospital.model)
    shared = given.parameters[hospital.coordinates]
    load_flat_parameters(hospital.model, join_parts(shared, own, hospital.coordinates))
    load_flat_buffers(hospital.model, given.statistics)
    hospital.digests.take(parameters=hospital.shared_parameters, statistics=given.statistics)
    if given.normalisation is None:
        return
    try:
        normalisation = Normalisation.of_tensor(given.normalisation, hospital.config)
    except DataError as error:
        raise ProtocolError(f"{AGGREGATOR} sent a normalisation that cannot be: {error.what}", SAME_VERSION) from None
    if hospital.normalisation not in (None, normalisation):
        raise ProtocolError(
            f"{AGGREGATOR} sent another normalisation of inputs than before", "it does not follow the protocol"
        )
    hospital.digests.take(normalisation=given.normalisation)
    hospital.normalise(normalisation)


def send_model(aggregator: Aggregator, links: Links, names: tuple[str, ...]) -> None:
    """Parameters, frozen statistics and normalisation of inputs, for hospitals that begin, join, or begin anew."""
    given = model_to_give(aggregator)

    def send(name: str) -> None:
        links.send_tensor(name, "parameters", given.parameters)
        links.send_tensor(name, "statistics", given.statistics)
        if given.normalisation is not None:
            links.send_tensor(name, "normalisation", given.normalisation)

    broadcast(names, send)


def receive_model(hospital: Hospital, links: Links, normalised: bool) -> None:
    """A hospital's side of `send_model`, so that all start bit for bit alike. Raises as `take_model`."""
    parameters, buffers = flatten_parameters(hospital.model), flatten_buffers(hospital.model)
    received = links.receive_tensor(AGGREGATOR, "parameters", torch.float32, parameters.shape)
    statistics = links.receive_tensor(AGGREGATOR, "statistics", torch.float32, buffers.shape)
    shape, values = (2, hospital.config.data.input_shape[0]), None
    if normalised:
        values = links.receive_tensor(AGGREGATOR, "normalisation", torch.float64, shape)
    take_model(hospital, GlobalModel(received, statistics, values))


def send_calibration(links: Links, digests: ModelDigests, hospitals: tuple[str, ...], fitted: Calibration) -> None:
    """At the aggregator: what calibrates the final model, for those that have it."""
    values = fitted.tensor()
    digests.take(calibration=values)
    broadcast(hospitals, lambda name: links.send_tensor(name, "calibration", values))


def receive_calibration(links: Links, digests: ModelDigests, config: Config) -> Calibration:
    """A hospital's side of `send_calibration`. Raises `ProtocolError` for what cannot be fitted (`Grid.has`)."""
    values = links.receive_tensor(AGGREGATOR, "calibration", torch.float64, (1 + len(config.data.classes),))
    try:
        calibration = Calibration.of_tensor(values)
    except DataError as error:
        raise ProtocolError(f"{AGGREGATOR} sent a calibration that cannot be: {error.what}", SAME_VERSION) from None
    fitted = config.evaluation.calibrate
    if fitted == "none" or not Grid(len(config.data.classes), fitted).has(calibration):
        raise ProtocolError(
            f"{AGGREGATOR} sent a calibration that is no point of the public grid", "it does not follow the protocol"
        )
    digests.take(calibration=values)
    return calibration


def send_global(links: Links, digests: ModelDigests, hospitals: tuple[str, ...], shared: torch.Tensor) -> None:
    """At the aggregator: the new global parameters, float32, for the hospitals of the sum they were made of."""
    broadcast(hospitals, lambda name: links.send_tensor(name, "global model", shared))
    digests.take(parameters=shared)


def receive_global(links: Links, digests: ModelDigests, size: int) -> torch.Tensor:
    """A hospital's side of `send_global`, float32 (size,)."""
    shared = links.receive_tensor(AGGREGATOR, "global model", torch.float32, (size,))
    digests.take(parameters=shared)
    return shared
